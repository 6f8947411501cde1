"""Sets of text that are well known for calibration, by name: `--calibration c4`.

A revision is a commit of the repository; where there is none here, the newest is looked up, and the report says which
that was. `NAME@REVISION` takes another one.
"""

from dataclasses import dataclass

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """
    Attributes:
        repository, config, revision: of the hub.
        train, test: splits; None: nothing is held out.
        column: the field that holds the text, or the messages of a chat.
        license: as the repository's card names it.
        lines: rows are lines of a text that is read in order, not documents.
    """

    repository: str
    config: str
    train: str
    test: str | None
    column: str
    license: str
    revision: str | None
    lines: bool = False


PRESETS = {
    "wikitext2": Preset(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "train",
        "test",
        "text",
        "CC-BY-SA-3.0, GFDL",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        lines=True,
    ),
    "c4": Preset(
        "allenai/c4", "en", "train", "validation", "text", "ODC-BY", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
    ),
    "fineweb-edu": Preset(
        "HuggingFaceFW/fineweb-edu",
        "sample-10BT",
        "train",
        None,
        "text",
        "ODC-BY",
        "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",
    ),
    "ultrachat": Preset(
        "HuggingFaceH4/ultrachat_200k",
        "default",
        "train_sft",
        "test_sft",
        "messages",
        "MIT",
        "8049631c405ae6576f93f445c6b8166f76f5505a",
    ),
    "tulu3": Preset(
        "allenai/tulu-3-sft-mixture",
        "default",
        "train",
        None,
        "messages",
        "ODC-BY, parts of it not for commercial use",
        "b14afda60f1bbebe55d5d2fa1e4df5042f97f8be",
    ),
    "openthoughts": Preset(
        "open-thoughts/OpenThoughts-114k", "default", "train", None, "conversations", "Apache-2.0", None
    ),
}
