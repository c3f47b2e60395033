"""Step 9, distillation: step 8's network learns from a large one, too.

Target: 99.4 % in the last epoch, with fewer than 10,000 parameters in fewer than 15 epochs.

Change: the loss. Nine tenths of it is the divergence from what the network of `teacher.py` gives for the same augmented
image, at a temperature of 4. The parameters of the teacher are not counted: it is not needed once training has ended.

Result: not trained yet with the seeds that a figure needs.

Analysis: none yet.
"""

from dataclasses import replace
from functools import partial

from mnist_lab import main
from mnist_lab.objectives import distillation
from step8_averaging import EXPERIMENT as STEP8

EXPERIMENT = replace(STEP8, objective=partial(distillation, teacher="teacher", temperature=4.0, weight=0.9))

if __name__ == "__main__":
    main(EXPERIMENT)
