"""Models built from structmat.nn."""

from structmat.models.gpt import GPT
from structmat.models.llama import Llama
from structmat.models.mlp import MLP
from structmat.models.resnet import ResNet
from structmat.models.vit import ViT

__all__ = ["GPT", "MLP", "Llama", "ResNet", "ViT"]
