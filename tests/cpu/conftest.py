"""For tests that need torch: one thread each.

Tiny models are faster on one thread than on several that wait for each other, and pytest-xdist fills the other cores.
"""

import torch

torch.set_num_threads(1)
