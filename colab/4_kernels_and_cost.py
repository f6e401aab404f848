# %% [markdown]
# # 4. Kernels and cost
#
# When is a structured product faster than a dense one? A bound from the chip's data sheet, break-even sizes measured on this
# machine, and where structure does not pay.
#
# Fewer FLOPs are not less time. A product also moves numbers, and small or scattered products run far below a chip's peak.
# This notebook separates the three.

# %%
# setup

# %%
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from pallas_kernels import CHIPS, kronecker
from structmat.analysis.timing import interleaved, median_ratio
from structmat.nn import choose_path
from structmat.structures import parse

# %% [markdown]
# ## What a product needs
#
# `bound.cost(rows, dtype)` counts one product: FLOPs of the algorithm, and bytes of the parameters, of what is read and of
# what is written. FLOPs per byte is the arithmetic intensity. Look at how it falls: a structure saves FLOPs, and bytes of
# weights, but x and y stay what they are.
#
# **Try:** `rows = 1`, as in a chat with one user. Then all that counts is the bytes of the weights.

# %%
n, rows = 4096, 4096
texts = [
    "dense()",
    "low_rank(rank=512)",
    "monarch(blocks=4, order='blocked')",
    "monarch(blocks=16, order='blocked')",
    "block_diagonal(blocks=16)",
    "kronecker(terms=1)",
    "low_rank(rank=256) + random_sparse(density=0.03)",
]
lines = ["| structure | parameters | GFLOPs | MB | FLOPs per byte |", "|---|---|---|---|---|"]
for text in texts:
    cost = parse(text).bind(n, n).cost(rows, jnp.bfloat16)
    numbers = f"{cost.flops / 1e9:.1f} | {cost.bytes / 1e6:.0f} | {cost.flops / cost.bytes:.0f}"
    lines.append(f"| `{text}` | {cost.params / n**2:.1%} | {numbers} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## The roofline
#
# A chip with P FLOP/s and B bytes/s does at most min(P, intensity x B). `pallas_kernels.CHIPS` has both from the makers' data
# (bf16). Left of a chip's ridge a product waits for memory. Look at which structures are left of it: they save FLOPs that were
# not the bottleneck any more.
#
# **Try:** other chips of `CHIPS`, or the `rows` above.

# %%
chips = ["v5e", "v5p", "v6e", "h100"]
figure = Figure(figsize=(8.5, 4.2), layout="constrained")
panel = figure.subplots()
span = np.geomspace(1, 2e4, 200)
for i, name in enumerate(chips):
    chip = CHIPS[name]
    panel.plot(span, np.minimum(chip.flops, span * chip.bandwidth) / 1e12, color=f"C{i}", label=name)
    for j, text in enumerate(texts):
        cost = parse(text).bind(n, n).cost(rows, jnp.bfloat16)
        x = cost.flops / cost.bytes
        y = min(chip.flops, x * chip.bandwidth) / 1e12
        panel.plot(x, y, "osD^vP*"[j], color=f"C{i}", ms=6)
for j, text in enumerate(texts):
    panel.plot([], [], "osD^vP*"[j], color="0.3", ls="", label=text)
panel.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s at most")
panel.grid(alpha=0.3, which="both")
figure.legend(fontsize=8, loc="outside right upper")
display(figure)

# %% [markdown]
# So there is a most that any structure can gain over dense: it still reads x and writes y once. For a square product of width
# n that is n / (2 ridge), whatever the structure. Look at the widths where it is below 1: there dense itself waits for memory,
# and no structure helps a layer of many rows.

# %%
widths = [256, 1024, 4096, 16384]
lines = [
    "| chip | ridge, FLOPs per byte |" + "".join(f" n = {w} |" for w in widths),
    "|---|---|" + "---|" * len(widths),
]
for name in chips:
    chip = CHIPS[name]
    lines.append(f"| {name} | {chip.ridge:.0f} |" + "".join(f" {chip.bound(w, w):.1f}x |" for w in widths))
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## Measured here
#
# Each structure beside dense, call by call in turn, so that the machine's moods fall on both. Look at where each line crosses
# 1: left of it the structure is slower than dense, for all its saved FLOPs. Lines are ragged where the machine has other work.
#
# **Try:** `batch = 8`, more `repeats`, or `n_m_sparse(n=2, m=4)`, which is stored sparse and multiplied dense. `python -m experiments.bench --suite=cpu` does it for every structure.

# %%
batch, sizes = 256, [64, 128, 256, 512, 1024]
measured = [
    "low_rank(rank={n8})",
    "monarch(blocks=4, order='blocked')",
    "kronecker(terms=1)",
    "random_sparse(density=0.1)",
]


def product(text, n):
    """(compiled function, its arguments, bound) of x @ W."""
    bound = parse(text.replace("{n8}", str(n // 8))).bind(n, n)
    params = bound.init(jax.random.key(0))
    return jax.jit(bound.matmul), (params, jax.random.normal(jax.random.key(1), (batch, n))), bound


speedups = {text: [] for text in measured}
for n in sizes:
    dense, dense_args, _ = product("dense()", n)
    for text in measured:
        ours, args, _ = product(text, n)
        base, times = interleaved([dense, ours], [dense_args, args], repeats=21)
        speedups[text].append(1 / median_ratio(times, base))

figure = Figure(figsize=(7.5, 3.8), layout="constrained")
panel = figure.subplots()
for text, values in speedups.items():
    panel.plot(sizes, values, "o-", label=text.replace("{n8}", "n / 8"))
panel.axhline(1, color="0.4", lw=1)
panel.set_xscale("log", base=2)
panel.set_yscale("log", base=2)
panel.set(xlabel="width n", ylabel="speed-up over dense", title=f"{batch} rows, float32, this machine")
panel.grid(alpha=0.3)
panel.legend(fontsize=8)
display(figure)

for text, values in speedups.items():
    pays = [n for i, n in enumerate(sizes) if min(values[i:]) > 1]
    print(f"{text.replace('{n8}', 'n / 8')}: faster than dense from n = {pays[0] if pays else 'none of these'}")

# %% [markdown]
# The repository keeps such a measurement of a quieter machine, with all structures: these are its rows at width 4096. Efficiency
# is the speed-up over the FLOPs saved; 1 would mean that every FLOP saved is time saved. Look at the families of high saving and
# low efficiency (dashed: equal efficiency): many small products, or scattered entries.

# %%
stored = json.loads(Path("results/bench/cpu.json").read_text())
rows_4096 = [r for r in stored["metrics"]["rows"] if (r["n"], r["batch"], r["direction"]) == (4096, 512, "forward")]
print(
    f"{stored['device']['cpu']}, {stored['device']['cores']} cores, jax {stored['versions']['jax']}, {stored['date']}"
)
figure = Figure(figsize=(8, 4.4), layout="constrained")
panel = figure.subplots()
for efficiency in (1, 0.3, 0.1, 0.03):
    panel.plot([1, 2e4], [efficiency, 2e4 * efficiency], "--", color="0.7", lw=0.8)
    panel.text(200 / efficiency, 200, f"{efficiency:g}", fontsize=8, ha="right", color="0.4")
named = (
    "low_rank",
    "monarch(blocks=16)",
    "kronecker(terms=1)",
    "n_m",
    "random",
    "butterfly",
    "tucker",
    "cp",
    "diagonal",
)
for r in rows_4096:
    x, y = float(r["flop_reduction"]), r["speedup"]
    if np.isfinite(x) and x > 0:
        chosen = r["label"].startswith(named) and " + " not in r["label"]
        panel.plot(x, y, "o", color="C1" if chosen else "C0", ms=4)
        panel.annotate(r["label"] if chosen else "", (x, y), (4, -8), textcoords="offset points", fontsize=7)
panel.axhline(1, color="0.4", lw=1)
panel.set(
    xscale="log", yscale="log", xlim=(0.8, 4e4), ylim=(0.3, 3e2), xlabel="FLOPs saved", ylabel="speed-up over dense"
)
display(figure)

# %% [markdown]
# ## `path='auto'`
#
# Where factors would be slower, `StructuredDense(path='auto')` forms the dense matrix and multiplies once; the parameters stay
# few. It decides by the measured efficiencies: `choose_path` says what, and why. Look at how the choice flips with the number
# of rows: forming the matrix is paid once, however many rows there are. Below the table both are timed.
#
# **Try:** other terms of Kronecker, or `low_rank(rank=300)`.

# %%
width = 512
lines = ["| structure | rows | path | why |", "|---|---|---|---|"]
for text in [
    "kronecker(terms=1)",
    "kronecker(terms=16)",
    "low_rank(rank=64)",
    "low_rank(rank=300)",
    "random_sparse(density=0.1)",
]:
    for count in (1, 64, 4096):
        path, why = choose_path(parse(text).bind(width, width), count)
        lines.append(f"| `{text}` | {count} | {path} | {why} |")
display(Markdown("\n".join(lines)))

bound = parse("kronecker(terms=16)").bind(width, width)
params = bound.init(jax.random.key(0))
factored = jax.jit(bound.matmul)
formed = jax.jit(lambda params, x: x @ bound.materialize(params))
for count in (1, 64, 4096):
    x = jax.random.normal(jax.random.key(1), (count, width))
    times = interleaved([factored, formed], [(params, x), (params, x)], repeats=15)
    by_factors, by_matrix = (1e3 * statistics.median(t) for t in times)
    print(f"kronecker(terms=16), {count} rows: factored {by_factors:.2f} ms, formed and multiplied {by_matrix:.2f} ms")

# %% [markdown]
# ## Kernels on other chips
#
# On TPUs the hot products run as Pallas kernels where a rule says they pay. The rule is a function of shapes and chip, so it can
# be asked here, without the chip. `docs/kernels.md` has the rules and what stands behind them.
#
# **Try:** `CHIPS["v6e"]`, or minor factors that are no multiple of 128.

# %%
for sizes in [(1, 32, 128, 32, 128), (1, 64, 64, 64, 64)]:  # terms, and the sizes of both factors
    for name in ("v5e", "cpu"):
        choice = kronecker.choose(1024, sizes, "bfloat16", CHIPS[name])
        print(f"{sizes} on {name}: {choice.implementation} ({choice.unsupported or choice.reason})")
