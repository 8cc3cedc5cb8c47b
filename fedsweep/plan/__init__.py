"""What is to be done: parameters, configuration, grids. Pure: opens no file, no socket, no clock."""
