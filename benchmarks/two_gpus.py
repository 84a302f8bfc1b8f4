"""Training steps that two GPUs share, beside one GPU's of the same machine: table and picture of the records.

The records are `bpt-rl bench step at_350m --activations save_attention ...`, each with its command in it.

python benchmarks/two_gpus.py results/two_gpus --out results/two_gpus.png
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bpt_rl.run.picture_style import PICTURE_STYLE

# Of each record: what it is compared with, of the same machine and day; nothing where one GPU cannot do the same.
PAIRS = {
    "ring": "one",
    "ulysses": "one",
    "ring_524k": "one_524k",
    "ulysses_524k": "one_524k",
    "ring_1m": None,
    "ulysses_1m": None,
    "fsdp_524k": "one_524k",
    "data": "one_beside_fsdp",
    "fsdp": "one_beside_fsdp",
}
HEADINGS = (
    "tokens a row",
    "rows",
    "mesh",
    "step s",
    "one GPU, same rows, s",
    "tokens/s to one GPU's",
    "GiB a GPU",
    "one GPU, GiB",
    "sending s",
    "of it hidden",
)
COLOURS = {"ring": "C0", "ulysses": "C1"}
LOSSES = {"one device": "loss_one", "ring": "loss_ring", "ulysses": "loss_ulysses"}


def row_of(folder, name):
    [row] = json.loads((folder / f"{name}.json").read_text())["rows"]
    return row


def lines(folder):
    yield "| " + " | ".join(HEADINGS) + " |"
    yield "|" + "---|" * len(HEADINGS)
    for name, other in PAIRS.items():
        row = row_of(folder, name)
        alone, ratio, one_gib = one_gpu(row, row_of(folder, other)) if other else ("", "", "")
        sending, hidden = row["communication_seconds"], row["hidden_seconds"]
        cells = [
            f"{row['tokens']:,}",
            row["num_rows"],
            row["mesh"],
            f"{row['step_seconds']:.3f}",
            alone,
            ratio,
            f"{row['device_bytes'] / 2**30:.1f}",
            one_gib,
            f"{sending:.3f}" if sending else "",
            f"{hidden / sending:.0%}" if sending else "",
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"


def alone_and_ratio(row, one):
    """Returns one GPU's seconds for the same rows, which it takes one after another, and two GPUs' speed beside it."""
    alone = one["step_seconds"] * row["num_rows"] / one["num_rows"]
    return alone, alone / row["step_seconds"]


def one_gpu(row, one):
    alone, ratio = alone_and_ratio(row, one)
    return f"{alone:.3f}", f"**{ratio:.2f}**", f"{one['device_bytes'] / 2**30:.1f}"


def differences(folder):
    """Yields how far losses are from one device's, by mesh: the largest of the steps, and the mean."""
    one = row_of(folder, LOSSES["one device"])["losses"]
    for label, name in LOSSES.items():
        apart = [abs(a - b) for a, b in zip(row_of(folder, name)["losses"], one, strict=True)]
        if label != "one device":
            yield label, max(apart), sum(apart) / len(apart), len(apart)


def draw(folder, out):
    with mpl.rc_context(PICTURE_STYLE):
        figure = Figure(figsize=(10, 4))
        left, right = figure.subplots(1, 2)
        names = [name for name, other in PAIRS.items() if other and name.startswith(("ring", "ulysses"))]
        for place, name in enumerate(names):
            _, ratio = alone_and_ratio(row_of(folder, name), row_of(folder, PAIRS[name]))
            left.bar(place, ratio, width=0.6, color=COLOURS[name.split("_")[0]])
            left.annotate(f"{ratio:.2f}", (place, ratio - 0.04), ha="center", va="top", color="white")
        left.axhline(2, color="0.5", linewidth=1, linestyle="--")
        labels = [f"{name.split('_')[0]}\n{row_of(folder, name)['tokens']:,}" for name in names]
        left.set_xticks(range(len(names)), labels)
        left.set(ylim=(0, 2.3), ylabel="tokens/s of two GPUs over one's", title="One row, its tokens shared")
        one = row_of(folder, LOSSES["one device"])["losses"]
        for label in ("ring", "ulysses"):
            losses = row_of(folder, LOSSES[label])["losses"]
            apart = [a - b for a, b in zip(losses, one, strict=True)]
            right.plot(range(1, len(one) + 1), apart, "o-", color=COLOURS[label], label=label)
        right.axhline(0, color="0.5", linewidth=1)
        right.set_xticks(range(2, len(one) + 1, 2))
        right.set(
            xlabel="gradient step, 32,768 tokens",
            ylabel="loss less one device's",
            title=f"Losses fall from {one[0]:.2f} to {min(one):.2f}",
        )
        right.legend(frameon=False)
        figure.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("two_gpus.png"))
    options = parser.parse_args()
    print("\n".join(lines(options.folder)))
    for label, largest, mean, count in differences(options.folder):
        print(f"{label}: {count} losses, from one device's {largest:.1e} at most, {mean:.1e} in the mean")
    draw(options.folder, options.out)


if __name__ == "__main__":
    main()
