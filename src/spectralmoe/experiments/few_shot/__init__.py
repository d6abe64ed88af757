"""Several ways to learn a task from few images, on the same frozen backbone and the same images."""
