"""--offload: Adam's two moments in host memory, for one GPU that would be too small with them.

The moments are 8 of the 18 bytes of a parameter that is trained in full (4 weight, 4 gradient, 8 moments, 2 the copy that
samples), and nothing needs them but AdamW's step. So they stay on the host: each weight and its gradient visit the CPU for the
step, one after the other, and the new weight goes back. That copies 12 bytes per parameter and step; an RL step with its rollout
takes far longer.
"""

import torch
from torch.optim._functional import adamw  # what torch.optim.AdamW.step calls


class HostAdamW(torch.optim.AdamW):
    """AdamW whose state is in host memory, wherever the parameters are. Bit for bit torch's fused AdamW of the CPU.

    The state is keyed by the parameters themselves, so checkpoints find it as they find AdamW's.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter, device="cpu")
                    state["exp_avg_sq"] = torch.zeros_like(parameter, device="cpu")
                weight, gradient = parameter.cpu(), parameter.grad.cpu()  # on a CPU: the tensors themselves
                moments = [state["exp_avg"]], [state["exp_avg_sq"]]
                beta1, beta2 = group["betas"]
                adamw(
                    [weight], [gradient], *moments, [], [state["step"]], fused=True, amsgrad=False, maximize=False,
                    beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                )  # fmt: skip
                if weight.device != parameter.device:
                    parameter.copy_(weight)
