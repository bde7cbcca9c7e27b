# CUDA and cuDNN come as wheels with TensorFlow itself (the extra "gpu"), in the versions of constraints.txt: NumPy,
# TensorFlow and CUDA are chosen in one place, and the host needs nothing but its driver and the NVIDIA container toolkit.
# The extra "codecs" unpacks compressed images (JPEG, JPEG-LS, JPEG 2000).
FROM python:3.11-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /opt/lungct
COPY pyproject.toml constraints.txt settings.ini README.md LICENSE ./
COPY lungct lungct
COPY nbs nbs
RUN python -m pip install --constraint constraints.txt --editable '.[gpu,codecs]'

# not root: what a run writes belongs to an ordinary user
RUN useradd --create-home --uid 1000 lungct && mkdir /runs && chown lungct /runs
USER lungct
WORKDIR /home/lungct
VOLUME /runs

# docker run IMAGE --dicom-path ...: arguments go to `lungct run`; `--entrypoint lungct IMAGE doctor` gives the rest
ENTRYPOINT ["lungct", "run", "--run-dir", "/runs/course"]
