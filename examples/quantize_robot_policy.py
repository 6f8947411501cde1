"""A policy of two cameras, a state and actions to come, in 8 and 4 bits: python examples/quantize_robot_policy.py"""

import torch
from torch import Tensor, nn

from gptq_ao import gptq_config, quantize_

WIDTH, JOINTS, STEPS = 64, 7, 8


class Policy(nn.Module):
    """Images and the robot's state are encoded together; from them a decoder makes a chunk of actions."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, WIDTH, 3, 2), nn.ReLU())
        self.state = nn.Linear(JOINTS, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True)
        self.queries = nn.Parameter(torch.randn(STEPS, WIDTH))
        self.action = nn.Linear(WIDTH, JOINTS)

    def forward(self, cameras: dict[str, Tensor], state: Tensor) -> Tensor:
        """Images [B, 3, H, W] of each camera, and [B, JOINTS]; actions [B, STEPS, JOINTS]."""
        seen = [self.eye(image).flatten(2).transpose(1, 2) for image in cameras.values()]
        memory = self.encoder(torch.cat([self.state(state)[:, None], *seen], 1))
        return self.action(self.decoder(self.queries.expand(len(state), -1, -1), memory))


def moment(count: int) -> dict[str, Tensor | dict[str, Tensor]]:
    """In place of recorded episodes: the arguments of one call, by name."""
    cameras = {name: torch.randn(count, 3, 24, 24) for name in ("wrist", "scene")}
    return {"cameras": cameras, "state": torch.randn(count, JOINTS)}


def main() -> None:
    torch.manual_seed(0)
    policy = Policy().eval()
    now = moment(1)
    with torch.no_grad():
        before = policy(**now)
    # What sees and what acts are small, so that more bits for them cost little.
    rules = {"re:eye.*": {"bits": 8}, "action": {"bits": 8}}
    report = quantize_(policy, gptq_config(bits=4, rules=rules, calibration=[moment(8) for _ in range(16)]))
    print(report)
    assert report.capture == "export"
    with torch.no_grad():
        after = policy(**now)
    print(f"actions differ by {((after - before).norm() / before.norm()).item():.1%}")


if __name__ == "__main__":
    main()
