"""A trainer under torchrun that sends its weights into a running server after every step.

    VLLM_SERVER_DEV_MODE=1 titan-bridge serve DIR --weight-transfer-config '{"backend": "titan"}'
    torchrun --nproc-per-node 2 scripts/examples/live_weights.py DIR --url http://localhost:8000

The steps are real: they lower the loss of one fixed sentence, which the server then continues. vLLM is not needed here.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from titan_bridge.reference import load_reference
from titan_bridge.transfer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="what the server serves")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()

    dist.init_process_group("gloo")
    model = load_reference(given.model).model.train().requires_grad_(True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*model.layers.values(), model]:
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.arange(5, 37)[None]  # any text: these ids exist in every vocabulary

    with Trainer(model, given.url) as trainer:
        for step in range(given.steps):
            loss = F.cross_entropy(model(tokens[:, :-1])[0].float(), tokens[0, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report = trainer.send(f"step {step}")  # the server has it when this returns
            if dist.get_rank() == 0:
                sent = sum(report.received.values()) / 1e6
                print(
                    f"step {step}: loss {loss.item():.3f}, {report.kind}, {sent:.2f} MB in {report.seconds:.2f} s"
                )
        trainer.verify()  # by fingerprints: every worker has what the trainer has
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
