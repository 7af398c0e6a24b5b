"""Settings of every test process and of the processes it starts; before torch reads them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads of one test do not spin against another's
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
