"""MRI from few scans: mSENSE against a U-Net, configs/mri.py:msense or :unet.

    python -m experiments.train --config=configs/mri.py:msense --workdir=runs/mri_msense
    python -m experiments.train --config=configs/mri.py:unet --workdir=runs/mri_unet --config.data.acceleration=4.0

After Dao et al. (2022), on phantoms instead of scans. mSENSE trains Monarch factors of the inverse Fourier transforms
along rows and columns, of slice rank 1 at side 64: `blocks` should be near the root of another `data.size`, which it divides.
`--config.structure="dense()"` trains full matrices instead. Zero-filled and conjugate gradient SENSE are in the record.
"""

from structmat.training import config as defaults

MODELS = {
    # structure, learning rate
    "msense": ("monarch(blocks=8)", 1e-3),
    "unet": ("dense()", 3e-3),
}


def get_config(arg=None):
    structure, rate = defaults.named(MODELS, arg, "configs/mri.py")
    config = defaults.default("mri", arg)
    config.structure = structure
    config.steps = 300
    config.batch = config.data.train
    config.optim.update(lr=rate, weight_decay=0.0)
    if arg == "unet":
        config.mup.base_width = config.model.width
    return config
