"""A curriculum: in each epoch the shortest prompts come first: torchrun -m teaching.curriculum"""

import data
import processes
import train_dpo


class ShortFirst(data.Prompts):
    def order(self, epoch):
        return sorted(super().order(epoch), key=lambda place: len(self.row(*place).ids))


data.Prompts = ShortFirst
if __name__ == "__main__":
    processes.launch(train_dpo.main)
