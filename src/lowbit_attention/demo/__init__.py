"""The main job: a real model's attention, quantised and compared layer by layer."""
