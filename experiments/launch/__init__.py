"""Start the processes of a run: on this machine (`local`), under SLURM (`slurm`), on the workers of TPU VMs (`tpu_pod`)."""
