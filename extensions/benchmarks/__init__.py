"""litlora against its peers, on the same work in one sitting. README.md has one command per yardstick id.

Drivers (`train_c1`, `start`) import no torch: they start every tool in a process of its own, in turn, and put the
figures together. Runners (`run_litgpt`, `run_peft`, `run_litlora`) do one tool's work and print one JSON line.
"""
