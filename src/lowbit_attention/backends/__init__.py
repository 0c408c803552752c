"""Who can run a call: kernels, torch and the emulation, and who chooses among them."""
