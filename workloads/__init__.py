"""Programs that run in other processes: training (in Ray), model servers. They know nothing of the studio around them."""
