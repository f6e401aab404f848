"""What the table of all structures says of a family."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class About:
    """One row of `docs/structures.md`, kept beside the family it describes; n = d_in, m = d_out.

    Attributes:
      example: a text of the family that binds at every square size 64, 256, 1024, 4096; the sharding tests and the
        benchmark run on it.
      formula: of W.
      params: stored real numbers.
      flops: per row of x.
      nearest: what `project` guarantees.
      sharding: what is split over a mesh, and what is communicated.
      paper: author and year.
      when: the use it is for.
      kernel: the operation of `pallas_kernels` that multiplies it, or "-".
    """

    example: str
    formula: str
    params: str
    flops: str
    nearest: str
    sharding: str
    paper: str
    when: str
    kernel: str = "-"
