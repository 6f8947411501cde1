from gptq_ao.cli import main

main()
