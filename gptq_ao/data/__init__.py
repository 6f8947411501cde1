"""Calibration and held-out data: text from files and the hub, and what processors make of images and audio."""

from gptq_ao.data.batches import Batches
from gptq_ao.data.chats import as_chats
from gptq_ao.data.documents import read_documents
from gptq_ao.data.presets import PRESETS
from gptq_ao.data.processors import processor_batches
from gptq_ao.data.text import spaced, text_batches, text_samples, token_chunks

__all__ = [
    "PRESETS",
    "Batches",
    "as_chats",
    "processor_batches",
    "read_documents",
    "spaced",
    "text_batches",
    "text_samples",
    "token_chunks",
]
