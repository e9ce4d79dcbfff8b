# sftmix with its CUDA kernels:
#
#     docker build -t sftmix .
#     docker run --gpus all -v "$PWD:/work" sftmix doctor
#
# CUDA's major version has to be that of the torch that pip installs, which refuses another.
ARG CUDA=13.0.2

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/sftmix
ENV PATH=/opt/sftmix/bin:$PATH
WORKDIR /src
# A layer of its own: a change of the code does not download torch again.
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt setuptools ninja wheel torch
COPY . .
# There is no GPU while an image is built: all major chips that nvcc knows are compiled for.
RUN pip install --no-cache-dir --no-build-isolation -c constraints.txt ".[plots,peft,trl]"

FROM ubuntu:24.04
# Triton compiles what launches its kernels when they first run.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/sftmix /opt/sftmix
ENV PATH=/opt/sftmix/bin:$PATH
# What NVIDIA's container runtime brings in from the host.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["sftmix"]
CMD ["--help"]
