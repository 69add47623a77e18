# samft on NVIDIA GPUs; docs/many_gpus.md says how to build and start it.

# CUDA as in the wheel of the pinned torch, which brings its own libraries: the base image has
# NVIDIA's runtime refuse hosts whose driver is too old for them.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04

# libgl1 and libglib2.0-0t64 are what opencv-python links to.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv libgl1 libglib2.0-0t64 \
    && rm -rf /var/lib/apt/lists/*

# As in a clone, so that the paths in the documentation hold.
WORKDIR /samft
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH

# What is installed depends on these files alone: other changes do not download it again.
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY samft/__init__.py samft/
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --no-cache-dir -c constraints.txt -e .
COPY . .

# Whoever `docker run --user` names can write here. Downloaded checkpoints are kept with the runs.
RUN useradd --create-home trainer && mkdir -p data runs && chmod 1777 data runs /home/trainer
ENV HOME=/home/trainer USER=trainer SAMFT_CACHE=/samft/runs/cache
USER trainer
VOLUME ["/samft/data", "/samft/runs"]

ENTRYPOINT ["bash", "/samft/launch.sh"]
