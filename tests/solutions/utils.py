"""The utils.py of template.py."""


class TensorBoardLogger:
    def __init__(self, summary_writer, avg_window=50, name=None):
        self.summary_writer = summary_writer
        self.avg_window = avg_window
        self.name = name
        self.global_step = 0
        self.values = {}

    def add_values(self, values):
        for key, value in values.items():
            self.values.setdefault(key, []).append(float(value))
        self.global_step += 1
        if self.global_step % self.avg_window == 0:
            for key, window in self.values.items():
                tag = f"{self.name}/{key}" if self.name else key
                self.summary_writer.add_scalar(tag, sum(window) / len(window), self.global_step)
            self.values = {}
