"""Pipeline parallelism: stages of consecutive layers and the schedules that run them."""
