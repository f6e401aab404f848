"""Thin Flax modules that hold a structure, and the table of sites they form."""

from structmat.nn.conv import StructuredConv
from structmat.nn.linear import AUXILIARY, PROBE, StructuredDense, StructuredDenseGeneral, StructuredEmbed, product
from structmat.nn.monarch_transform import MonarchTransform
from structmat.nn.path import choose_path
from structmat.nn.sites import Site, Stack, assign, leaf_groups, pick, scope, site_params, sites
from structmat.nn.spectral_conv import SpectralConv
from structmat.nn.tensor_product import TensorProduct

__all__ = [
    "AUXILIARY",
    "PROBE",
    "MonarchTransform",
    "Site",
    "SpectralConv",
    "Stack",
    "StructuredConv",
    "StructuredDense",
    "StructuredDenseGeneral",
    "StructuredEmbed",
    "TensorProduct",
    "assign",
    "choose_path",
    "leaf_groups",
    "pick",
    "product",
    "scope",
    "site_params",
    "sites",
]
