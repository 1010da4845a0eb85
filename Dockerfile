# A slim Python is base enough: the torch wheels bring CUDA and cuDNN, the host brings the driver.
# The tag fixes Python's and Debian's release and still gets their security rebuilds.
FROM python:3.13-slim-trixie AS trainer

LABEL org.opencontainers.image.title="train_lora" \
      org.opencontainers.image.description="Trains LoRA adapters for Stable Diffusion, Z-Image, FLUX and Krea 2" \
      org.opencontainers.image.licenses="MIT"

# tini hands signals on and reaps; PID 1 without it ignores SIGTERM while Python starts.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini=0.19.* \
 && rm -rf /var/lib/apt/lists/*

# The base has no bytecode of the standard library; without it, each start would compile it anew.
RUN python -m compileall -q -x site-packages /usr/local/lib/python3.*

WORKDIR /app

# The packages, gigabytes of them, stay a cached layer while only the program changes.
COPY requirements.txt ./
RUN pip install --no-cache-dir --root-user-action=ignore --requirement requirements.txt

# Modes are set here, as a checkout under a strict umask would be unreadable for other users.
COPY --chmod=644 train_lora.py config_schema.json LICENSE ./
COPY --chmod=644 families/*.py families/

# Open to every user like /tmp, so that --user works; a new named volume inherits that.
RUN install --directory --mode=1777 /data /output /cache
VOLUME ["/data", "/output", "/cache"]

# HOME and HF_HOME are the one cache volume: models, and kernels compiled by the driver.
ENV HOME=/cache \
    HF_HOME=/cache \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

USER 1000:1000
STOPSIGNAL SIGTERM

# A job is healthy while it runs, and its exit code and last line tell the rest. Where it serves
# this port, by http_port, it also has to answer there.
ENV HEALTH_PORT=8765
HEALTHCHECK --interval=60s --timeout=10s --start-period=60s CMD ["python", "-S", "-c", \
  "import os, socket; \
   caller = socket.socket(); \
   caller.settimeout(5); \
   off = caller.connect_ex(('127.0.0.1', int(os.environ['HEALTH_PORT']))); \
   off or caller.sendall(b'GET /healthz HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n'); \
   raise SystemExit(not off and b' 200 ' not in caller.recv(100))"]

# Options are the trainer's; anything else is a command of its own, as some hosts write
# `python train_lora.py --config …`. exec leaves no shell between the program and its signals.
ENTRYPOINT ["/usr/bin/tini", "--", "sh", "-c", \
            "case $1 in -*) exec python /app/train_lora.py \"$@\";; *) exec \"$@\";; esac", "run"]
CMD ["--help"]

# `docker build --target tools .`: the programs around the trainer, each run as a command:
# docker run … python tools/pipeline.py --config …
FROM trainer AS tools
USER 0:0
COPY tools/requirements.txt tools/
RUN pip install --no-cache-dir --root-user-action=ignore --requirement tools/requirements.txt
COPY --chmod=644 tools/*.py tools/
USER 1000:1000

# `docker build --target studio .`: the studio, as compose.yaml starts it.
FROM tools AS studio
USER 0:0
COPY studio/requirements.txt studio/
RUN pip install --no-cache-dir --root-user-action=ignore --requirement studio/requirements.txt
COPY --chmod=644 studio/*.py studio/
COPY --chmod=644 studio/templates/*.html studio/templates/
COPY --chmod=644 studio/static/*.* studio/static/
COPY --chmod=644 studio/static/vendor/* studio/static/vendor/
COPY --chmod=644 examples/configs/*.json examples/configs/

# Datasets, runs and the database are one volume, as runs keep their images by hard links.
RUN install --directory --mode=1777 /studio
VOLUME /studio
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["python", "-c", \
  "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]

# All ends with the first process, so jobs are asked to save and end before.
CMD ["python", "-m", "studio", "--root", "/studio", "--host", "0.0.0.0", "--port", "8000", \
     "--no-browser", "--stop-jobs"]

# Without a target, the last stage is built: the trainer alone.
FROM trainer
