"""Weights in and out: Hugging Face folders become runs and runs become such folders; any model is saved as safetensors."""

from structmat.exchange.incoming import Incoming, Row, bring_in, run_config
from structmat.exchange.outgoing import export_huggingface, save_run
from structmat.exchange.sources import HuggingFace, Saved, Source, source_at
from structmat.exchange.structured import Loaded, load_safetensors, open_folder, save_safetensors

__all__ = [
    "HuggingFace",
    "Incoming",
    "Loaded",
    "Row",
    "Saved",
    "Source",
    "bring_in",
    "export_huggingface",
    "load_safetensors",
    "open_folder",
    "run_config",
    "save_run",
    "save_safetensors",
    "source_at",
]
