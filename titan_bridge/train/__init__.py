"""Training: TOML -> TorchTitan's own Trainer under torchrun -> checkpoints that can be served without conversion.

`build.py` turns a TOML file into TorchTitan's config, `launch.py` starts the processes, `worker.py` is one of
them, `output.py` says what lies where in the output folder, `cpu.py` holds everything that gives way on a CPU.
"""
