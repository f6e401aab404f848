"""Every task the loop knows, one line each; a task module has `defaults()`, `check(config)` and `build(config)`."""

from structmat.training.tasks import digits, images, lm, mri, navier_stokes, teacher

TASKS = {
    "lm": lm,
    "digits": digits,
    "images": images,
    "teacher": teacher,
    "mri": mri,
    "navier_stokes": navier_stokes,
}
