"""Reports to show."""

from gptq_ao.report import Choice, Decision, Report, Unit, WeightReport

__all__ = ["HOSTILE", "report"]

# What would do something if it were not escaped: in HTML, in an attribute, in SVG, in rich's markup, in TeX, in UTF-8.
HOSTILE = (
    "<script>document.title='gone'</script>",
    '"><img src=x onerror="document.title=\'gone\'">',
    "</script></style></svg></table><h1>",
    "]]><!-- &lt; &",
    "[red]not markup[/nothing]",
    "$\\frac{",
    "模型\u202e\ud800",
)


def report(layers: int = 3, names: tuple[str, ...] = (), experts: int = 0) -> Report:
    """Of a model of 7 weights in each layer; `names` are of more weights, messages and settings."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    known = [f"model.layers.{i}.{kind}.weight" for i in range(layers) for kind in kinds] + list(names)
    weights = tuple(
        WeightReport(
            name=name,
            shape=(64 + 64 * (i % 3), 128),
            bits=(3, 4, 8)[i % 3],
            group_size=64,
            method="gptq",
            stage=i + 1,
            rows=1000 + i,
            damp=0.01 * (1 + i % 4),
            dead=0,
            # One is exact, of one nothing is known.
            error=None if i == 1 else 0.0 if i == 2 else 1e-3 * ((7 * i) % 11 + 1),
            bytes=900 + 100 * (i % 5),
            original_bytes=16384,
            fallback="12 rows" if i == 4 else None,
            expert_rows=tuple(range(i, i + experts)),
        )
        for i, name in enumerate(known)
    )
    units = (Unit((w.name,), (Choice(2, 10, 0.2 / (i + 1)), Choice(4, 20, 0.01))) for i, w in enumerate(weights))
    return Report(
        weights=weights,
        excluded={"model.embed_tokens.weight": "also the embedding table", **{n: n for n in names}},
        stages=len(weights),
        hessians=len(weights),
        seconds={"capture": 1.5, "calibrate": 20.0, "solve": 3.25},
        peak_bytes={"host": 2**31, "activations": 4000},
        warnings=("something to know", *names),
        capture="replay",
        capture_reason=f"a branch {' '.join(names)}",
        notes=names,
        precision=tuple(Decision(unit, unit.choices[1], 64 * 128) for unit in units),
        recipe={"recipe": "4 bits", **{n: n for n in names}},
        measured={"KL": 0.0123456, **dict.fromkeys(names, 1.0)},
    )
