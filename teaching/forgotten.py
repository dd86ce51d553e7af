"""A reload that leaves one tensor out: torchrun -m teaching.forgotten --sampler hf"""

import processes
import sampler_hf
import train_dpo


def reload(self, weights, version, forgotten="model.layers.0.mlp.up_proj.weight"):
    self.version, held = version, self.lm.state_dict()
    [held[name].copy_(tensor) for name, tensor in weights if name != forgotten]


sampler_hf.HFSampler.reload = reload
if __name__ == "__main__":
    processes.launch(train_dpo.main)
