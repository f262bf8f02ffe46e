import os

# verl settles its platform at its first import, in whichever test module that happens. The tests of this process run on
# the CPU; those that need an accelerator start processes of their own.
os.environ.setdefault("VERL_PLATFORM", "cpu")
