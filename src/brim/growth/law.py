"""Compute-optimal training: loss as a function of parameters and tokens.

L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., arXiv:2203.15556, approach 3), with the coefficients of Epoch
AI's replication (Besiroglu et al., arXiv:2404.10102). The paper's own coefficients are rounded, and contradict its own
twenty tokens for each parameter: `PUBLISHED` is here to show that, not to plan with.

Fitted to decoder-only models on web text. Models that many people will run are trained on far more tokens than this.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingLaw:
    a: float
    b: float
    e: float
    alpha: float
    beta: float

    def loss(self, num_parameters: float, tokens: float) -> float:
        """Nats for each token."""
        return self.e + self.a / num_parameters**self.alpha + self.b / tokens**self.beta

    def optimal_tokens(self, num_parameters: float) -> float:
        """Tokens at which no other split of the same compute gives a lower loss.

        At C = 6 N D the derivative of L along N D = const is zero where alpha A / N^alpha = beta B / D^beta.
        """
        return (self.beta * self.b * num_parameters**self.alpha / (self.alpha * self.a)) ** (1 / self.beta)

    def optimal_parameters(self, flops: float) -> float:
        """Parameters of the model that this compute trains best: N D = flops / 6 in the same condition."""
        product, exponents = flops / 6, self.alpha + self.beta
        return (self.alpha * self.a / (self.beta * self.b)) ** (1 / exponents) * product ** (self.beta / exponents)


REPLICATION = ScalingLaw(a=482.01, b=2085.43, e=1.8169, alpha=0.3478, beta=0.3658)
PUBLISHED = ScalingLaw(a=406.4, b=410.7, e=1.69, alpha=0.34, beta=0.28)
