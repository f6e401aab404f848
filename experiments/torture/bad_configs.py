"""Wrong configs by the hundred: typos and types for every field there is, values and structures that cannot be."""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from structmat.structures import FAMILIES
from structmat.training.config import default


@dataclasses.dataclass(frozen=True)
class Bad:
    """A wrong config.

    Attributes:
      kind: typo, type, value or structure. field: the dotted name the message has to hold. value: the wrong value.
      config: all of it. meant: what a suggestion has to offer, if the fault is a typo.
    """

    kind: str
    field: str
    value: Any
    config: ConfigDict
    meant: str = ""


VALUES: dict[str, tuple[Any, ...]] = {
    "seed": (-1, 2**31),
    "steps": (0, -5, 2**31),
    "batch": (0, -1, 12),
    "max_skips": (0, -1),
    "log_every": (0, -3),
    "eval.every": (-1,),
    "eval.batches": (-2,),
    "checkpoint.every": (0, -200),
    "checkpoint.keep": (0, -1),
    "profile": ("5", "20:10", "0:99999999", "a:b", "-1:5"),
    "model.name": ("resnet9000", ""),
    "model.layers": (0, -1),
    "model.width": (0, -16),
    "model.heads": (0, 5, 1000),
    "model.kv_heads": (0, 5, 1000),
    "model.hidden": (0, -8),
    "model.context": (0, -1),
    "model.vocab": (1, 0, -256),
    "model.mlp_ratio": (0, -4),
    "model.patch": (0, 5),
    "model.theta": (0.0, -1.0),
    "model.eps": (0.0,),
    "model.dropout": (1.0, -0.1, 2.0),
    "model.dtype": ("float16", "f32", "int8"),
    "model.remat": ("everything", ""),
    "optim.name": ("lion9", ""),
    "optim.schedule": ("step", ""),
    "optim.lr": (0.0, -1e-3, float("nan"), float("inf")),
    "optim.warmup": (-1.0, 2.5, 1e9),
    "optim.weight_decay": (-0.1, float("inf")),
    "optim.b1": (1.0, -0.5),
    "optim.b2": (1.0, 1.5),
    "optim.eps": (0.0, -1e-8),
    "optim.clip": (-1.0,),
    "mup.base_width": (0, -128),
    "method": ("rigll()", "rigl(drop=2.0)", "set(every=10**9)", "set(every=10)"),
    "switch": ("dense()", "0.9: dnse()", "1.5: dense()", "0.9: layer -> dense()", "0.9: dense(); 0.5: dense()"),
    "task": ("vision9", "", None, 3),
}
"""Field -> values out of range, indivisible (batch and heads on 8 devices) or unknown; fields a config lacks are left out."""
MESHES = (
    {"data": 3},
    {"data": 16},
    {"fsdp": 3},
    {"tensor": 16},
    {"tensor": 0},
    {"data": -1, "fsdp": -1},
    {"fsdp": -2},
    {"replica": 3},
    {"replica": 0},
    {"replica": 2, "tensor": 8},
)
STRUCTURES = (
    *("low_rank(rank=0)", "low_rank(rank=-1)", "low_rank(rank=100000)", "low_rank(rank=2.5)", "low_rank(rank='8')"),
    *("low_rank()", "low_rank(8, 8)", "low_rank(rank=8", "spectral(rank=1000000)", "block_diagonal(blocks=7)"),
    *("block_diagonal(blocks=100000)", "monarch(blocks=7)", "monarch(blocks=0)", "monarch(blocks=4, order='block')"),
    *(
        "kronecker(terms=0)",
        "kronecker(in_factors=(3, 7), out_factors=(4, 4))",
        "tensor_train(rank=0)",
        "tucker(rank=0)",
    ),
    *("tensor_ring(rank=0)", "tensor_ring(rank=2, cores=1)", "cp(rank=0)", "block_tensor_train(rank=0)"),
    *("block_low_rank(in_blocks=7, out_blocks=8, rank=2)", "block_low_rank(in_blocks=8, out_blocks=8, rank=1000)"),
    *(
        "random_sparse(density=0.0)",
        "random_sparse(density=1.5)",
        "random_sparse(density=True)",
        "n_m_sparse(n=4, m=2)",
    ),
    *(
        "n_m_sparse(n=2, m=5)",
        "n_m_sparse(n=0, m=4)",
        "block_sparse(block=7, density=0.25)",
        "channel_sparse(density=0.0)",
    ),
    *("quantized(bits=0)", "quantized(bits=99)", "quantized(bits=4, group=7)", "dictionary(atoms=0, nonzeros=8)"),
    *("dictionary(atoms=4, nonzeros=8)", "blast(blocks=7, rank=8)", "butterfly(depth=0)", "householder(reflections=0)"),
    *(
        "einsum(theta=(0.5,))",
        "einsum(in_factors=(3, 5), out_factors=(4, 4), rank=2)",
        "dct(kind=9)",
        "block_circulant(block=7)",
    ),
    *(
        "fit(low_rank(), params=0.0)",
        "fit(low_rank(), params=-1)",
        "low_rank(rank=4) +",
        "dense() dense()",
        "dense().x",
    ),
    *(
        "__import__('os')",
        "1 + dense()",
        "frozen()",
        "transpose(3)",
        "masked(dense(), dense())",
        "product(dense(), dense())",
    ),
    *("layers_9999/.* -> dense()", "layers_( -> dense()", "toeplitz(3)", "identity(rank=2)", "fourier()", ""),
)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of every field."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def altered(config: ConfigDict, field: str, value: Any, new_name: str = "") -> ConfigDict:
    """The config with another value, or with the field under another name."""
    config = ConfigDict(config.to_dict())
    *parents, last = field.split(".")
    with config.unlocked(), config.ignore_type():
        node = config
        for part in parents:
            node = node[part]
        if new_name:
            del node[last]
        node[new_name or last] = value
    return config


def misspelt(name: str, valid: set[str], rng: random.Random) -> str:
    """`name` with a letter dropped, doubled, exchanged with its neighbour or struck wrongly; never another valid name, nor as
    near to one: what `bx` was meant to be, b1 or b2, nobody can say."""
    near = lambda wrong, other: difflib.SequenceMatcher(None, other, wrong).ratio()
    while True:
        i = rng.randrange(len(name))
        edits = [name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:]]
        edits += [name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :], name[:i] + "x" + name[i + 1 :]]
        wrong = rng.choice(edits)
        if not wrong or wrong in {name, *valid} or not wrong.isidentifier():
            continue
        if all(near(wrong, other) < near(wrong, name) for other in valid - {name}):
            return wrong


def bad_configs(task: str, model: str, rng: random.Random) -> Iterator[Bad]:
    """All there are for a model of a task."""
    base = default(task, model)
    fields = dict(leaves(base))
    for field, value in fields.items():
        *parents, last = field.split(".")
        siblings = {f.split(".")[-1] for f in fields} | set(base.keys())
        for _ in range(2 if len(last) > 2 else 1):
            wrong = misspelt(last, siblings, rng)
            named = ".".join([*parents, wrong])
            if field != "task":
                yield Bad("typo", named, value, altered(base, field, value, wrong), last)
        other = {bool: "yes", int: rng.choice([2.5, "3", None]), float: rng.choice(["1e-3", None]), str: 7}[type(value)]
        if field != "task":
            yield Bad("type", field, other, altered(base, field, other))
    for field, values in VALUES.items():
        for value in values if field in fields else ():
            yield Bad("value", field, value, altered(base, field, value))
    for spec in MESHES:
        mesh = base.mesh.to_dict() | ({"data": 1} if "data" not in spec else {}) | spec
        yield Bad("value", "mesh", mesh, altered(base, "mesh", ConfigDict(mesh)))
    for text in STRUCTURES:
        yield Bad("structure", "structure", text, altered(base, "structure", text))
    for name, family in FAMILIES.items():
        wrong = family.about.example.replace(name, misspelt(name, set(FAMILIES), rng), 1)
        yield Bad("structure", "structure", wrong, altered(base, "structure", wrong), name)
