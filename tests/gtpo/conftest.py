import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors: a second thread only waits

settings.register_profile("gtpo", max_examples=60, deadline=None)
settings.load_profile("gtpo")
