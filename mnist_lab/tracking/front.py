"""Where an environment that was installed before `tracking.server` finds MLflow's application with the lab's page."""

from mnist_lab.tracking.server import make_app as make_app
