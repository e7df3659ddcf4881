# The parts of tritonclient that this project uses; the package ships no types of its own.
