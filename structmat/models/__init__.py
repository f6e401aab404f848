"""Models built from structmat.nn."""

from structmat.models.fno import FNO
from structmat.models.gpt import GPT
from structmat.models.llama import Llama
from structmat.models.mixer import Mixer
from structmat.models.mlp import MLP
from structmat.models.monarch_operator import MonarchOperator
from structmat.models.msense import MSense
from structmat.models.resnet import FieldResNet, ResNet
from structmat.models.resnet_v1 import VGG, ResNetV1
from structmat.models.unet import UNet
from structmat.models.vit import ViT

__all__ = [
    "FNO",
    "GPT",
    "MLP",
    "VGG",
    "FieldResNet",
    "Llama",
    "MSense",
    "Mixer",
    "MonarchOperator",
    "ResNet",
    "ResNetV1",
    "UNet",
    "ViT",
]
