//! One host: a network namespace, its addresses and its link.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::process::run;

/// Megabits (10^6 bits) per second.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Mbit(pub u32);

/// A host of a lab. Clones are the same host.
#[derive(Clone, Debug)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    namespace: String,
    /// The namespace that the other end of its link is in, where it is called as the host is.
    bridge: String,
    dir: PathBuf,
    v4: Option<Ipv4Addr>,
    v6: Ipv6Addr,
}

/// Bytes that went over a host's link, headers of all layers included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Bytes towards the host.
    pub received_bytes: u64,
    /// Bytes from the host.
    pub sent_bytes: u64,
}

impl Host {
    pub(super) fn attach(
        name: &str,
        namespace: &str,
        bridge: &str,
        dir: PathBuf,
        v4: Option<Ipv4Addr>,
        v6: Ipv6Addr,
    ) -> Result<Self> {
        add_namespace(namespace)?;
        ip(&format!(
            "link add eth0 netns {namespace} type veth peer name {name} netns {bridge}"
        ))?;
        ip(&format!("-n {bridge} link set dev {name} master br0 up"))?;
        ip(&format!("-n {namespace} link set eth0 up"))?;
        ip(&format!("-n {namespace} addr add {v6}/64 dev eth0 nodad"))?;
        match v4 {
            Some(v4) => ip(&format!("-n {namespace} addr add {v4}/16 dev eth0"))?,
            None => ip(&format!("-n {namespace} addr del 127.0.0.1/8 dev lo"))?,
        }
        let inner = Inner {
            name: name.into(),
            namespace: namespace.into(),
            bridge: bridge.into(),
            dir,
            v4,
            v6,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// A host whose only way out is through `router`, which translates addresses and forwards its TCP port `outside` to
    /// port `inside` here.
    pub(super) fn behind_nat(
        name: &str,
        namespace: &str,
        router: &Self,
        dir: PathBuf,
        [outside, inside]: [u16; 2],
    ) -> Result<Self> {
        let v4 = Ipv4Addr::new(192, 168, 77, 2);
        let v6 = Ipv6Addr::new(0xfd00, 77, 0, 0, 0, 0, 0, 2);
        let outer = router.namespace();
        add_namespace(namespace)?;
        ip(&format!(
            "link add eth0 netns {namespace} type veth peer name {name} netns {outer}"
        ))?;
        ip(&format!("-n {outer} link set dev {name} up"))?;
        ip(&format!("-n {outer} addr add 192.168.77.1/24 dev {name}"))?;
        ip(&format!("-n {namespace} link set dev eth0 up"))?;
        ip(&format!("-n {namespace} addr add {v4}/24 dev eth0"))?;
        ip(&format!(
            "-n {namespace} route add default via 192.168.77.1"
        ))?;
        router.enter(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"))??;
        let nat = |rule: String| router.run("iptables", &rule.split(' ').collect::<Vec<_>>());
        nat("-t nat -A POSTROUTING -o eth0 -j MASQUERADE".to_owned())?;
        nat(format!(
            "-t nat -A PREROUTING -i eth0 -p tcp --dport {outside} -j DNAT --to-destination {v4}:{inside}"
        ))?;
        let inner = Inner {
            name: name.into(),
            namespace: namespace.into(),
            bridge: outer.into(),
            dir,
            v4: Some(v4),
            v6,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// The name given to [`super::Lab::host`].
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The name of its network namespace, as `ip netns` knows it.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// A folder for what runs on this host, removed with the lab.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// Its IPv4 address, unless the lab is IPv6-only.
    #[must_use]
    pub fn v4(&self) -> Option<Ipv4Addr> {
        self.0.v4
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.0.v6
    }

    /// The address to reach it by: IPv4 where it has one.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        self.0.v4.map_or(IpAddr::V6(self.0.v6), IpAddr::V4)
    }

    /// Its loopback address, of the family of [`Host::ip`].
    #[must_use]
    pub fn loopback(&self) -> IpAddr {
        if self.0.v4.is_some() {
            Ipv4Addr::LOCALHOST.into()
        } else {
            Ipv6Addr::LOCALHOST.into()
        }
    }

    /// [`Host::ip`] and a port.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(), port)
    }

    /// Limits what the host sends (`up`) and receives (`down`), by the shaper that the bound is defined with.
    /// May be called again with other rates.
    ///
    /// # Errors
    /// When `tc` refuses.
    pub fn shape(&self, up: Mbit, down: Mbit) -> Result<()> {
        for (namespace, device, Mbit(rate)) in self.ends(up, down) {
            ip(&format!(
                "-n {namespace} link set dev {device} gso_max_size 16384"
            ))?;
            tc(&format!(
                "-n {namespace} qdisc replace dev {device} root tbf rate {rate}mbit burst 64k latency 100ms"
            ))?;
        }
        Ok(())
    }

    /// Takes the link down, as a pulled cable does: peers see silence, not a reset.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn unplug(&self) -> Result<()> {
        ip(&format!(
            "-n {} link set dev {} down",
            self.0.bridge, self.0.name
        ))
    }

    /// Undoes [`Host::unplug`].
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn plug(&self) -> Result<()> {
        ip(&format!(
            "-n {} link set dev {} up",
            self.0.bridge, self.0.name
        ))
    }

    /// The bytes that went over the link since the host was made.
    ///
    /// # Errors
    /// When the kernel's counters cannot be read.
    pub fn link_counters(&self) -> Result<LinkCounters> {
        let table = self.enter(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"))
            .context("no eth0 in net/dev")?;
        let column = |i: usize| -> Result<u64> {
            Ok(line
                .split_whitespace()
                .nth(i)
                .context("a short line in net/dev")?
                .parse()?)
        };
        Ok(LinkCounters {
            received_bytes: column(0)?,
            sent_bytes: column(8)?,
        })
    }

    /// A command that will run on this host. It is `nsenter` that becomes `program`: the pid is the program's.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(net_option(&self.0.namespace))
            .arg("--")
            .arg(program);
        command
    }

    /// Runs a command on this host to its end; gives its standard output.
    ///
    /// # Errors
    /// When it cannot start or fails; the error has its standard error.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        run(self.command(program).args(args))
    }

    /// Runs `work` on a thread inside the namespace. Sockets made there stay there, wherever they are used later.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn enter<R: Send>(&self, work: impl FnOnce() -> R + Send) -> Result<R> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| move_thread_into(&self.0.namespace).map(|()| work()));
            inside
                .join()
                .map_err(|_| anyhow!("the work inside {} panicked", self.0.namespace))?
        })
    }

    /// A tokio runtime whose workers live in the namespace: a future *spawned* on it makes its sockets there. (The
    /// future given to `block_on` itself runs on the calling thread, which is elsewhere: use [`Host::block_on`].)
    ///
    /// # Errors
    /// When the namespace is gone or threads cannot be made.
    pub fn runtime(&self, workers: usize) -> Result<tokio::runtime::Runtime> {
        self.enter(|| ())?;
        let namespace = self.0.namespace.clone();
        let enter = move || {
            // A worker left outside would test the wrong network: better none.
            if let Err(error) = move_thread_into(&namespace) {
                eprintln!("{error:#}");
                std::process::abort();
            }
        };
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        Ok(builder
            .worker_threads(workers)
            .on_thread_start(enter)
            .enable_all()
            .build()?)
    }

    /// Runs a future to its end inside the namespace, on one thread.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn block_on<F>(&self, future: F) -> Result<F::Output>
    where
        F: Future + Send,
        F::Output: Send,
    {
        self.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            Ok(runtime.block_on(future))
        })?
    }

    /// The two sending ends of the link: (namespace, device, rate).
    fn ends(&self, up: Mbit, down: Mbit) -> [(&str, &str, Mbit); 2] {
        [
            (&self.0.namespace, "eth0", up),
            (&self.0.bridge, &self.0.name, down),
        ]
    }
}

/// `ip ARGS`, words separated by spaces.
pub(super) fn ip(args: &str) -> Result<()> {
    run(Command::new("ip").args(args.split_whitespace())).map(drop)
}

fn tc(args: &str) -> Result<()> {
    run(Command::new("tc").args(args.split_whitespace())).map(drop)
}

/// A new namespace with its loopback up. Its TCP and its bridges are what Debian's kernel has, whatever this machine set for itself:
/// cubic (a machine may have bbr, with which a burst takes a tenth longer), and no firewall over bridged frames (where dockerd loaded
/// `br_netfilter` it runs over each packet).
pub(super) fn add_namespace(name: &str) -> Result<()> {
    ip(&format!("netns add {name}")).context("this machine does not allow network namespaces")?;
    let script = "cd /proc/sys/net; echo cubic >ipv4/tcp_congestion_control; \
        for f in bridge/bridge-nf-call-*; do [ ! -e $f ] || echo 0 >$f; done";
    run(Command::new("ip").args(["netns", "exec", name, "sh", "-c", script]))?;
    ip(&format!("-n {name} link set lo up"))
}

/// The first argument of `nsenter` for a namespace.
pub(super) fn net_option(namespace: &str) -> String {
    format!("--net={}", namespace_path(namespace).display())
}

fn namespace_path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

fn move_thread_into(namespace: &str) -> Result<()> {
    let path = namespace_path(namespace);
    let link = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("entering {}", path.display()))
}
