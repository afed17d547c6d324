# Runs in the guest: the packaged units as an operator would use them, then the tests.
set -euo pipefail

main() {
  uname -sr
  ip link set lo up
  units
  echo "the packaged units: ok"
  checkout=$(cat /mnt/checkout.path)
  mkdir -p "$(dirname "$checkout")"
  ln -s /mnt/checkout "$checkout"
  cd /mnt/bin
  ./deps/promises --color never $(cat /mnt/arguments)
}

units() {
  install -D /mnt/bin/pointsman /mnt/bin/refusal -t /usr/bin
  install -D /mnt/bin/echo /mnt/bin/hello -t /usr/lib/pointsman
  cp /mnt/checkout/packaging/systemd/* /etc/systemd/system/
  configure
  systemctl daemon-reload
  systemctl start pointsman-function@hello.socket pointsman-gateway
  trap complain EXIT
  until_true serves
  pointsman status | grep -q '(sockmap)'
  [ "$(cat /sys/fs/cgroup/system.slice/pointsman-supervise.service/supervised-*-echo/memory.max)" = 67108864 ]

  systemctl kill --signal KILL pointsman-gateway
  until_true serves

  systemctl stop pointsman-gateway pointsman-supervise pointsman-function@hello.{socket,service}
  nothing_is_left
  trap - EXIT
}

configure() {
  mkdir -p /etc/pointsman
  cd /etc/pointsman
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=hello \
    -addext subjectAltName=DNS:hello.localhost -keyout hello.key -out hello.pem 2>/dev/null
  cat > pointsman.toml <<CONFIG
[gateway]
http = "[::]:8080"
https = "[::]:8443"
verdict = "sockmap"
functions_dir = "/run/pointsman/functions"

[functions.echo]
command = ["/usr/lib/pointsman/echo"]
memory_max = "64M"

[functions.hello]
CONFIG
  cd /
}

serves() {
  [ "$(curl -sf http://localhost:8080/function/echo -d hi)" = hi ] &&
    [ "$(curl -sf --cacert /etc/pointsman/hello.pem 'https://hello.localhost:8443/?name=you')" = 'Hello, you!' ]
}

# For at most a minute.
until_true() {
  for _ in $(seq 120); do
    "$@" && return
    sleep 0.5
  done
  "$@"
}

nothing_is_left() {
  # The kernel frees programs a moment after their last user has gone.
  for _ in $(seq 50); do
    left=$(
      bpftool prog show | grep -o ' name pm_[a-z0-9_]*' || true
      find /sys/fs/bpf /run/pointsman/functions -mindepth 1
      find /sys/fs/cgroup -name 'pointsman-*' -o -name 'supervised-*'
      find /proc -maxdepth 2 -name exe -printf 'process %l\n' 2>/dev/null |
        grep -E '/(pointsman|refusal|lib/pointsman/[a-z]+)$' || true
    )
    [ -z "$left" ] && return
    sleep 0.2
  done
  echo "left behind: $left"
  return 1
}

complain() {
  echo "the packaged units: FAILED"
  journalctl --no-pager --output cat -u 'pointsman-*' | tail -n 100
}

main
