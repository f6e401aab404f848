"""Start the processes of a run: on this machine (`local`), under SLURM (`slurm`), on TPU VMs (`tpu_pod`)."""
