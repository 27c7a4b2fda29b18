# The image of every node of a cluster, head and workers alike: Ray and raymeld both refuse nodes
# whose versions differ.
#
#   docker build --tag raymeld:0.1.0-cuda .
#   docker build --tag raymeld:0.1.0-cpu --build-arg TORCH=cpu .
#
# torch brings its own CUDA libraries; the driver, and the NVIDIA container toolkit that shows it to
# the container, are the host's.
FROM python:3.11-slim-bookworm

# `ray up` on the head starts the workers over ssh and copies with rsync; it also takes files over
# from the host's user with sudo. `ray exec --tmux` needs tmux, and KubeRay's probes wget.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client rsync sudo tmux wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --shell /bin/bash ray \
    && echo "ray ALL=(ALL) NOPASSWD: ALL" >/etc/sudoers.d/ray

# cuda or cpu
ARG TORCH=cuda

# The large part, which changes least, in a layer of its own. boto3 and google-api-python-client let
# a head start machines on AWS and GCP.
WORKDIR /opt/raymeld
COPY requirements.lock ./
RUN case "${TORCH}" in \
        cuda) index= ;; \
        cpu) index=--extra-index-url=https://download.pytorch.org/whl/cpu ;; \
        *) echo "TORCH is cuda or cpu, not '${TORCH}'" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir --constraint requirements.lock ${index} \
        "torch==2.13.0" "ray[default]==2.60.0" \
        "boto3==1.44.5" "google-api-python-client==2.202.0"

COPY pyproject.toml setup.py README.md LICENSE ./
COPY merge_core merge_core
COPY actors actors
COPY cluster cluster
RUN pip install --no-cache-dir --constraint requirements.lock . \
    && rm -rf /opt/raymeld/* \
    && install --directory --owner=ray --group=ray --mode=700 /home/ray/.ray

# `ray up` reads HOME here, to know where in the container ~/.ray is.
ENV HOME=/home/ray \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_USAGE_STATS_ENABLED=0

# A directory without packages of its own: Ray's workers look for `cluster` and `actors` here first.
USER 1000
WORKDIR /home/ray
CMD ["raymeld", "--help"]
