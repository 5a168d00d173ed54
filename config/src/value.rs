//! The types of values. Each one says in the reference how it is written, and reads TOML's texts and numbers alike.

use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::PathBuf;
use std::time::Duration;

use hawker_core::application::{Label, Pattern, Priority};
use hawker_core::intercept::Action;
use hawker_core::place::Network;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{Error, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use url::Url;

use crate::choice::{AuthorizationMode, CredentialSource, LogFormat};
use crate::problem::{Wrong, wrong};
use crate::quantity::{self, NetworkOrHost};

/// The number of values that a key takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One.
    One,
    /// One or a list.
    Many,
    /// True or false; the flag has no value.
    Switch,
    /// Tables in a list: `[[key]]`.
    Entries,
    /// Tables by host: `[key."HOST"]`.
    Hosts,
    /// A table: `[key]`. It has no flag.
    Table,
}

/// A type that a key can have.
pub trait Value: Sized {
    /// The type as the reference names it.
    const KIND: &'static str;
    /// The type as `--help` names it.
    const NAME: &'static str;
    /// One value, or several.
    const SHAPE: Shape = Shape::One;
}

impl<T: Value> Value for Option<T> {
    const KIND: &'static str = T::KIND;
    const NAME: &'static str = T::NAME;
    const SHAPE: Shape = T::SHAPE;
}

/// A list, written as a list or as its only value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Many<T>(pub Vec<T>);

impl<T> Default for Many<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Deref for Many<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Value> Value for Many<T> {
    const KIND: &'static str = T::KIND;
    const NAME: &'static str = T::NAME;
    const SHAPE: Shape = Shape::Many;
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Many<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrMany<T> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of texts")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Vec<T>, E> {
                Ok(vec![T::deserialize(text.into_deserializer())?])
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Vec<T>, E> {
                Ok(vec![T::deserialize(number.into_deserializer())?])
            }

            fn visit_f64<E: Error>(self, number: f64) -> Result<Vec<T>, E> {
                Ok(vec![T::deserialize(number.into_deserializer())?])
            }

            fn visit_bool<E: Error>(self, _: bool) -> Result<Vec<T>, E> {
                Err(E::custom("is no list of texts → write [\"…\", \"…\"]"))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Vec<T>, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Vec<T>, A::Error> {
                Err(A::Error::custom(
                    "is no list of texts → write [\"…\", \"…\"]",
                ))
            }
        }
        deserializer
            .deserialize_any(OneOrMany(PhantomData))
            .map(Many)
    }
}

/// A text or a number, as the text that it was written as.
struct Scalar {
    /// A truth is a text too.
    takes_truth: bool,
}

impl<'de> Visitor<'de> for Scalar {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("one text or number")
    }

    fn visit_str<E>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_i64<E>(self, number: i64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_f64<E>(self, number: f64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_bool<E: Error>(self, truth: bool) -> Result<String, E> {
        if self.takes_truth {
            Ok(truth.to_string())
        } else {
            Err(not_single())
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<String, A::Error> {
        Err(not_single())
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<String, A::Error> {
        Err(not_single())
    }
}

fn not_single<E: Error>() -> E {
    E::custom("is no single value → write one text or number")
}

/// True or false. A flag of this type has no value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Switch(pub bool);

impl Deref for Switch {
    type Target = bool;

    fn deref(&self) -> &bool {
        &self.0
    }
}

impl Value for Switch {
    const KIND: &'static str = "true or false";
    const NAME: &'static str = "BOOL";
    const SHAPE: Shape = Shape::Switch;
}

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = deserializer.deserialize_any(Scalar { takes_truth: true })?;
        quantity::yes_or_no(&text).map(Self).map_err(Error::custom)
    }
}

macro_rules! values {
    ($( $(#[$meta:meta])* $name:ident($inner:ty) = $parse:expr, $value:literal, $kind:literal; )*) => { $(
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name(pub $inner);

        impl Deref for $name {
            type Target = $inner;

            fn deref(&self) -> &$inner {
                &self.0
            }
        }

        impl Value for $name {
            const KIND: &'static str = $kind;
            const NAME: &'static str = $value;
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let takes_truth = $value == "BOOL";
                let text = deserializer.deserialize_any(Scalar { takes_truth })?;
                ($parse)(text.as_str()).map(Self).map_err(Error::custom)
            }
        }
    )* };
}

const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);

values! {
    /// A name for people.
    Text(String) = quantity::printable, "NAME", "text, 1 to 128 characters";
    /// True or false, always with a value.
    Truth(bool) = quantity::yes_or_no, "BOOL", "true or false";
    /// A directory.
    Directory(PathBuf) = directory, "DIR", "directory";
    /// A PEM file that this user may read.
    PemFile(PathBuf) = readable, "FILE", "PEM file";
    /// A PEM file that is read together with another one.
    PemPair(PathBuf) = anything, "FILE", "PEM file";
    /// A file that is looked at later.
    AnyFile(PathBuf) = anything, "FILE", "file, `-` for standard input";
    /// An address to listen on.
    Listen(SocketAddr) = quantity::listen, "ADDR", "IP:PORT";
    /// An address that others dial.
    HostPort(String) = quantity::host_port, "HOST:PORT", "HOST:PORT";
    /// A registry's host.
    Host(String) = quantity::registry_host, "HOST", "host";
    /// A registry's host, or all hosts of a domain.
    HostPattern(String) = quantity::registry_pattern, "PATTERN", "host or `*.example.com`";
    /// Addresses that begin alike.
    Cidr(Network) = quantity::network, "CIDR", "CIDR";
    /// Addresses that begin alike, or hosts.
    CidrOrHost(NetworkOrHost) = quantity::network_or_host, "CIDR|HOST", "CIDR or host";
    /// A registry's base address.
    Endpoint(Url) = quantity::endpoint, "URL", "URL";
    /// The right that counts.
    Mode(AuthorizationMode) = quantity::authorization, "MODE", "`relay`, `token`, `node`";
    /// A place of credentials.
    Credentials(CredentialSource) = quantity::credentials, "KIND:PLACE",
        "KIND:PLACE: `docker:FILE`, `containerd:FILE`, `kubernetes:FILE-OR-FOLDER`, `env:VARIABLE`";
    /// Bytes a second.
    Rate(u64) = quantity::rate, "SIZE", "rate";
    /// Bytes on disk.
    DiskSize(u64) = disk_size, "SIZE", "size, at least 64MiB";
    /// Bytes of memory for pieces.
    MemorySize(u64) = memory_size, "SIZE", "size, at least 16MiB";
    /// A part of the disk.
    Percent(u8) = quantity::percent, "PERCENT", "percent, 1 to 99";
    /// Pieces at once.
    Slots(u32) = |text: &str| quantity::count(text, 1, 1024), "N", "number, 1 to 1024";
    /// Pulls at once.
    AtOnce(u32) = |text: &str| quantity::count(text, 1, 1_000_000), "N", "number";
    /// A duration.
    UpToAnHour(Duration) = |text: &str| at_most(text, HOUR, "give an hour at most"), "DURATION", "duration, at most 1 hour";
    /// The longest time to wait for something, which is never nothing.
    Timeout(Duration) = timeout, "DURATION", "duration, 1s to 1 hour";
    /// A duration.
    UpToADay(Duration) = |text: &str| at_most(text, DAY, "give a day at most"), "DURATION", "duration, at most 1 day";
    /// A duration.
    UpToAMonth(Duration) = |text: &str| at_most(text, 30 * DAY, "give 30 days at most"), "DURATION",
        "duration, at most 30 days";
    /// The log's level, or directives.
    LogLevel(String) = anything, "LEVEL",
        "`error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,hawker_proxy=debug`";
    /// The form of log lines.
    Format(LogFormat) = quantity::log_format, "FORMAT", "`text` or `json`";
    /// The name of an application or of a tag.
    LabelText(Label) = quantity::label, "LABEL", "label: 1 to 64 letters, digits or `._-/:@+`";
    /// Repositories.
    PatternText(Pattern) = quantity::pattern, "PATTERN", "pattern; 64 at most";
    /// A pull's urgency.
    Level(Priority) = quantity::priority, "N", "0 to 6";
    /// The fate of a request to the forward proxy.
    ActionText(Action) = quantity::action, "ACTION", "`p2p` or `direct`";
    /// A part of a path.
    PathPattern(String) = quantity::path, "REGEX", "regular expression without spaces";
}

fn at_most(text: &str, most: Duration, cure: &str) -> Result<Duration, Wrong> {
    let duration = quantity::duration(text)?;
    if duration > most {
        wrong("is too long", cure)
    } else {
        Ok(duration)
    }
}

fn timeout(text: &str) -> Result<Duration, Wrong> {
    let duration = at_most(text, HOUR, "give an hour at most")?;
    if duration < Duration::from_secs(1) {
        wrong("is too short", "give a second or more")
    } else {
        Ok(duration)
    }
}

fn at_least(text: &str, least: u64, cure: &str) -> Result<u64, Wrong> {
    let bytes = quantity::size(text)?;
    if bytes < least {
        return wrong(
            format!("{} is too little", quantity::human_size(bytes)),
            cure,
        );
    }
    Ok(bytes)
}

fn disk_size(text: &str) -> Result<u64, Wrong> {
    at_least(text, 64 << 20, "give 64MiB or more")
}

fn memory_size(text: &str) -> Result<u64, Wrong> {
    at_least(
        text,
        16 << 20,
        "16MiB holds one of the longest pieces; give that or more",
    )
}

fn directory(text: &str) -> Result<PathBuf, Wrong> {
    if text.is_empty() {
        wrong("is empty", "name a directory")
    } else {
        Ok(PathBuf::from(text))
    }
}

fn anything<T: From<String>>(text: &str) -> Result<T, Wrong> {
    Ok(T::from(text.to_owned()))
}

fn readable(text: &str) -> Result<PathBuf, Wrong> {
    match std::fs::File::open(text) {
        Ok(_) => Ok(PathBuf::from(text)),
        Err(error) => wrong(
            format!("{text}: {error}"),
            "name a PEM file that this user may read",
        ),
    }
}

impl PartialOrd for Host {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Eq for Host {}

impl Ord for Host {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}
