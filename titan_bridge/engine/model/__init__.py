"""The served model: TorchTitan's modules built and lowered for one worker, behind the interface vLLM expects."""
