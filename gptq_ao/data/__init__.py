"""Calibration and held-out data: text from files and the hub, and what processors make of images and audio."""

from gptq_ao.data.chats import as_chats
from gptq_ao.data.documents import read_documents
from gptq_ao.data.presets import PRESETS
from gptq_ao.data.text import TextBatches, spaced, text_batches, text_samples, token_chunks

__all__ = [
    "PRESETS",
    "TextBatches",
    "as_chats",
    "read_documents",
    "spaced",
    "text_batches",
    "text_samples",
    "token_chunks",
]
