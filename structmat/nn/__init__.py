"""Thin Flax modules that hold a structure, and the table of sites they form."""

from structmat.nn.conv import StructuredConv
from structmat.nn.linear import AUXILIARY, PROBE, StructuredDense, StructuredDenseGeneral, StructuredEmbed, product
from structmat.nn.path import choose_path
from structmat.nn.sites import Site, Stack, assign, leaf_groups, pick, scope, site_params, sites

__all__ = [
    "AUXILIARY",
    "PROBE",
    "Site",
    "Stack",
    "StructuredConv",
    "StructuredDense",
    "StructuredDenseGeneral",
    "StructuredEmbed",
    "assign",
    "choose_path",
    "leaf_groups",
    "pick",
    "product",
    "scope",
    "site_params",
    "sites",
]
