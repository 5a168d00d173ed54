//! Between generated messages and core types. Everything from the wire is checked here, once.
//!
//! Messages of a later minor version are tolerated: unknown messages are skipped, and an unknown reason of refusal
//! counts as [`Refusal::Unable`]. A message that no honest member sends is an error, and ends the connection.

use std::net::Ipv6Addr;
use std::sync::Arc;

use hawker_core::application::{Label, Labels, Priority, Purpose};
use hawker_core::message::{Message, Offer, Refusal, Role};
use hawker_core::piece::{
    MAX_BLOB_BYTES, PeerId, PieceIndex, PieceLayout, PieceTable, SignedPrefix,
};
use hawker_core::right::Bearer;
use hawker_core::share::Share;
use hawker_oci::digest::{Algorithm, ChainValue, Digest};
use hawker_oci::reference::{MAX_NAME_BYTES, Source, canonical_host, is_repository};

use crate::v1;
use crate::v1::peer_message::Message as Wire;

/// Longest certificate of an issuer. Ours are a few hundred bytes.
pub const MAX_CERTIFICATE_BYTES: usize = 8 << 10;
/// Registries that a statement about a table may name.
pub const MAX_REGISTRIES: usize = 8;
const MAX_REGISTRY_BYTES: usize = 260;

/// Length of an Ed25519 signature (RFC 8032, 5.1.6).
const SIGNATURE_BYTES: usize = 64;

/// Longest name or zone of a member, in bytes.
pub const MAX_LABEL_BYTES: usize = 255;

/// Most addresses of one member.
pub const MAX_ADDRESSES: usize = 32;

/// Most members in one list.
pub const MAX_MEMBERS: usize = 4096;

/// A message that no honest member of this version sends. The sender's fault; the connection is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A field is missing or has an impossible value.
    #[error("bad {0}")]
    Bad(&'static str),
    /// The other side speaks another major version.
    #[error(
        "the other side speaks protocol version {theirs}, this side {ours}: upgrade the older one"
    )]
    Version {
        /// Theirs.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
}

type Result<T, E = ConvertError> = std::result::Result<T, E>;

/// `Ok` when `condition` holds, else an error that names the field.
fn ensure(condition: bool, field: &'static str) -> Result<()> {
    if condition {
        Ok(())
    } else {
        Err(ConvertError::Bad(field))
    }
}

/// Whether this side understands the other: the major versions are the same.
pub fn check_version(theirs: Option<v1::Version>) -> Result<()> {
    let theirs = theirs.ok_or(ConvertError::Bad("version"))?.major;
    let ours = crate::VERSION.major;
    if theirs == ours {
        Ok(())
    } else {
        Err(ConvertError::Version { theirs, ours })
    }
}

/// To the wire.
pub fn peer_message(message: &Message) -> v1::PeerMessage {
    let wire = match message {
        Message::Interest {
            task,
            source,
            size_bytes,
            token,
            purpose,
            far,
            passive,
            partial,
        } => Wire::Interest(v1::Interest {
            task: task.to_string(),
            source: Some(self::source(source)),
            size_bytes: *size_bytes,
            token: self::token(token.as_ref()),
            purpose: Some(self::purpose(purpose)),
            far_share: far.map(Share::bits),
            passive: *passive,
            partial: *partial,
        }),
        Message::Have {
            task,
            size_bytes,
            offer,
        } => Wire::Have(have(task, *size_bytes, offer)),
        Message::Table {
            task,
            size_bytes,
            first,
            values,
            signed,
        } => Wire::Table(v1::Table {
            task: task.to_string(),
            size_bytes: *size_bytes,
            first: *first,
            values: values_bytes(values),
            signed: signed.as_ref().map(signed_prefix),
        }),
        Message::Working { task } => Wire::Working(v1::Working {
            task: task.to_string(),
        }),
        Message::Unavailable { task, reason } => {
            let (reason, origin_status) = refusal(*reason);
            Wire::Unavailable(v1::Unavailable {
                task: task.to_string(),
                reason,
                origin_status,
            })
        }
        Message::Leave { task } => Wire::Leave(v1::Leave {
            task: task.to_string(),
        }),
        Message::Wrong { task, piece } => Wire::Wrong(v1::Wrong {
            task: task.to_string(),
            piece: *piece,
        }),
        Message::Request {
            request,
            task,
            piece,
            prefetch,
            priority,
        } => {
            let (request, task, piece, prefetch) = (*request, task.to_string(), *piece, *prefetch);
            let priority = self::priority(*priority);
            Wire::Request(v1::Request {
                request,
                task,
                piece,
                prefetch,
                priority,
            })
        }
        Message::Cancel { request } => Wire::Cancel(v1::Cancel { request: *request }),
        Message::Reject { request, reason } => {
            let (reason, origin_status) = refusal(*reason);
            Wire::Reject(v1::Reject {
                request: *request,
                reason,
                origin_status,
            })
        }
    };
    v1::PeerMessage {
        message: Some(wire),
    }
}

/// From the wire; `Ok(None)` for messages that are not about pieces (hello, manifests, ping) and for unknown ones.
pub fn from_peer_message(message: v1::PeerMessage) -> Result<Option<Message>> {
    let Some(message) = message.message else {
        return Ok(None);
    };
    Ok(Some(match message {
        Wire::Interest(interest) => {
            let v1::Interest {
                task,
                source,
                size_bytes,
                token,
                purpose,
                far_share,
                passive,
                partial,
            } = interest;
            Message::Interest {
                task: from_task(&task)?,
                source: from_source(source)?,
                size_bytes: size_bytes.map(from_size).transpose()?,
                token: from_token(&token)?,
                purpose: from_purpose(purpose)?,
                far: far_share.map(Share::from_bits),
                passive,
                partial,
            }
        }
        Wire::Have(have) => from_have(have)?,
        Wire::Table(table) => from_table(table)?,
        Wire::Working(v1::Working { task }) => Message::Working {
            task: from_task(&task)?,
        },
        Wire::Unavailable(v1::Unavailable {
            task,
            reason,
            origin_status,
        }) => Message::Unavailable {
            task: from_task(&task)?,
            reason: from_refusal(reason, origin_status)?,
        },
        Wire::Leave(v1::Leave { task }) => Message::Leave {
            task: from_task(&task)?,
        },
        Wire::Wrong(v1::Wrong { task, piece }) => Message::Wrong {
            task: from_task(&task)?,
            piece: from_piece(piece)?,
        },
        Wire::Request(v1::Request {
            request,
            task,
            piece,
            prefetch,
            priority,
        }) => {
            let (task, piece, priority) = (
                from_task(&task)?,
                from_piece(piece)?,
                from_priority(priority),
            );
            Message::Request {
                request,
                task,
                piece,
                prefetch,
                priority,
            }
        }
        Wire::Cancel(v1::Cancel { request }) => Message::Cancel { request },
        Wire::Reject(v1::Reject {
            request,
            reason,
            origin_status,
        }) => Message::Reject {
            request,
            reason: from_refusal(reason, origin_status)?,
        },
        Wire::Hello(_)
        | Wire::ManifestRequest(_)
        | Wire::ManifestReply(_)
        | Wire::Ping(_)
        | Wire::Pong(_) => {
            return Ok(None);
        }
    }))
}

/// For whom a pull is.
pub fn purpose(purpose: &Purpose) -> v1::Purpose {
    let Purpose { labels, priority } = purpose;
    let (application, tag) = (
        label(labels.application.as_ref()),
        label(labels.tag.as_ref()),
    );
    v1::Purpose {
        application,
        tag,
        priority: self::priority(*priority),
    }
}

/// The same from the wire; an absent field is the default.
pub fn from_purpose(purpose: Option<v1::Purpose>) -> Result<Purpose> {
    let v1::Purpose {
        application,
        tag,
        priority,
    } = purpose.unwrap_or_default();
    let (application, tag) = (
        from_optional_label(&application)?,
        from_optional_label(&tag)?,
    );
    Ok(Purpose {
        labels: Labels { application, tag },
        priority: from_priority(priority),
    })
}

/// The form of a pushed document: TOML with the keys of a node's file.
pub const DOCUMENT_FORMAT: u32 = 1;

/// Longest reason for a refused document; the rest of a longer one is cut off.
pub const MAX_REASON_BYTES: usize = 2 << 10;

/// A reason from the wire, without what could spoil a log or a terminal.
pub fn from_reason(reason: &str) -> String {
    let plain = reason.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut bytes = 0;
    plain
        .take_while(|c| {
            bytes += c.len_utf8();
            bytes <= MAX_REASON_BYTES
        })
        .collect()
}

fn label(label: Option<&Label>) -> String {
    label
        .map(|label| label.as_str().to_owned())
        .unwrap_or_default()
}

fn from_optional_label(text: &str) -> Result<Option<Label>> {
    if text.is_empty() {
        return Ok(None);
    }
    Label::new(text).map(Some).ok_or(ConvertError::Bad("label"))
}

/// The default goes without saying.
fn priority(priority: Priority) -> Option<u32> {
    Some(priority)
        .filter(|priority| *priority != Priority::default())
        .map(|p| u32::from(p.level()))
}

/// A level that a later version may know comes last.
fn from_priority(level: Option<u32>) -> Priority {
    level.map_or(Priority::default(), |level| {
        Priority::new(level).unwrap_or(Priority::LAST)
    })
}

/// The digest that names a task, a manifest or a subject.
pub fn from_task(text: &str) -> Result<Digest> {
    text.parse().map_err(|_| ConvertError::Bad("task"))
}

fn from_size(size_bytes: u64) -> Result<u64> {
    ensure(size_bytes <= MAX_BLOB_BYTES, "size")?;
    Ok(size_bytes)
}

fn from_piece(piece: u32) -> Result<u32> {
    ensure(piece < PieceLayout::new(MAX_BLOB_BYTES).count(), "piece")?;
    Ok(piece)
}

fn have(task: &Digest, size_bytes: u64, offer: &Offer) -> v1::Have {
    let (all, bits, pieces) = match offer {
        Offer::All => (true, Vec::new(), Vec::new()),
        Offer::Bits(bits) => (false, bits.clone(), Vec::new()),
        Offer::Some(pieces) => (false, Vec::new(), pieces.clone()),
    };
    v1::Have {
        task: task.to_string(),
        size_bytes,
        all,
        bits,
        pieces,
    }
}

fn from_have(have: v1::Have) -> Result<Message> {
    let v1::Have {
        task,
        size_bytes,
        all,
        bits,
        pieces,
    } = have;
    let (task, size_bytes) = (from_task(&task)?, from_size(size_bytes)?);
    let offer = from_offer(PieceLayout::new(size_bytes).count(), all, bits, pieces)?;
    Ok(Message::Have {
        task,
        size_bytes,
        offer,
    })
}

/// An offer is one of three things; nothing said at all is an offer of no pieces.
fn from_offer(count: u32, all: bool, bits: Vec<u8>, pieces: Vec<PieceIndex>) -> Result<Offer> {
    match (all, bits.is_empty(), pieces.is_empty()) {
        (true, true, true) => Ok(Offer::All),
        (false, false, true) => {
            ensure(bits.len() == count.div_ceil(8) as usize, "bits")?;
            Ok(Offer::Bits(bits))
        }
        (false, true, _) => {
            ensure(
                pieces.len() <= count as usize && pieces.iter().all(|piece| *piece < count),
                "pieces",
            )?;
            Ok(Offer::Some(pieces))
        }
        _ => Err(ConvertError::Bad("offer")),
    }
}

fn from_table(table: v1::Table) -> Result<Message> {
    let v1::Table {
        task,
        size_bytes,
        first,
        values,
        signed,
    } = table;
    let (task, size_bytes) = (from_task(&task)?, from_size(size_bytes)?);
    // The last piece has no value: the digest takes its place.
    let full_count = PieceLayout::new(size_bytes).count().saturating_sub(1);
    let values = from_values(task.algorithm(), &values)?;
    ensure(
        u64::from(first) + values.len() as u64 <= u64::from(full_count),
        "values",
    )?;
    let signed = signed
        .map(|signed| from_signed_prefix(signed, full_count))
        .transpose()?;
    Ok(Message::Table {
        task,
        size_bytes,
        first,
        values,
        signed,
    })
}

/// A whole table with its statement, to the wire.
pub fn table(table: &PieceTable) -> v1::Table {
    v1::Table {
        task: table.task().to_string(),
        size_bytes: table.layout().size_bytes(),
        first: 0,
        values: values_bytes(table.values()),
        signed: table.signed().map(signed_prefix),
    }
}

/// A table from its first value on, with a statement. Its form is checked, not its signature.
pub fn from_whole_table(table: Option<v1::Table>) -> Result<PieceTable> {
    let Message::Table {
        task,
        size_bytes,
        first: 0,
        values,
        signed: Some(signed),
    } = from_table(table.unwrap_or_default())?
    else {
        return Err(ConvertError::Bad("table"));
    };
    let mut table = PieceTable::new(task, PieceLayout::new(size_bytes));
    values.into_iter().for_each(|value| table.push(value));
    table.sign(signed);
    Ok(table)
}

fn values_bytes(values: &[ChainValue]) -> Vec<u8> {
    let mut raw = Vec::new();
    values.iter().for_each(|value| value.write_to(&mut raw));
    raw
}

fn from_values(algorithm: Algorithm, raw: &[u8]) -> Result<Vec<ChainValue>> {
    let value =
        |raw: &[u8]| ChainValue::from_bytes(algorithm, raw).ok_or(ConvertError::Bad("values"));
    raw.chunks(algorithm.len_bytes()).map(value).collect()
}

/// An issuer's statement, to the wire.
pub fn signed_prefix(signed: &SignedPrefix) -> v1::SignedPrefix {
    v1::SignedPrefix {
        count: signed.count,
        sealed: signed.sealed,
        signed_at_s: signed.signed_at_s,
        issuer: signed.issuer.0.to_vec(),
        registries: signed.registries.clone(),
        certificate: signed.certificate.to_vec(),
        signature: signed.signature.clone(),
    }
}

/// An issuer's statement about a table that is full with `full_count` values. Its form is checked, not its signature.
pub fn from_signed_prefix(signed: v1::SignedPrefix, full_count: u32) -> Result<SignedPrefix> {
    let v1::SignedPrefix {
        count,
        sealed,
        signed_at_s,
        issuer,
        certificate,
        signature,
        registries,
    } = signed;
    ensure(
        count <= full_count && (!sealed || count == full_count),
        "signed count",
    )?;
    ensure(
        (1..=MAX_CERTIFICATE_BYTES).contains(&certificate.len()),
        "issuer's certificate",
    )?;
    ensure(signature.len() == SIGNATURE_BYTES, "signature")?;
    let few = registries.len() <= MAX_REGISTRIES;
    ensure(
        few && registries
            .iter()
            .all(|name| name.len() <= MAX_REGISTRY_BYTES),
        "registries",
    )?;
    let (issuer, certificate) = (from_peer_id(&issuer)?, Arc::from(certificate));
    Ok(SignedPrefix {
        count,
        sealed,
        signed_at_s,
        issuer,
        registries,
        certificate,
        signature,
    })
}

/// A reason on the wire, and the origin's status that belongs to it (0 with the others).
fn refusal(reason: Refusal) -> (i32, u32) {
    let (reason, status) = match reason {
        Refusal::NotHeld => (v1::Refusal::NotHeld, 0),
        Refusal::Origin(status) => (v1::Refusal::Origin, status),
        Refusal::OriginUnreachable => (v1::Refusal::OriginUnreachable, 0),
        Refusal::Busy => (v1::Refusal::Busy, 0),
        Refusal::Draining => (v1::Refusal::Draining, 0),
        Refusal::Unable => (v1::Refusal::Unable, 0),
    };
    (reason.into(), status.into())
}

fn from_refusal(reason: i32, origin_status: u32) -> Result<Refusal> {
    Ok(match v1::Refusal::try_from(reason) {
        Ok(v1::Refusal::NotHeld) => Refusal::NotHeld,
        Ok(v1::Refusal::Origin) => Refusal::Origin(from_status(origin_status)?),
        Ok(v1::Refusal::OriginUnreachable) => Refusal::OriginUnreachable,
        Ok(v1::Refusal::Busy) => Refusal::Busy,
        Ok(v1::Refusal::Draining) => Refusal::Draining,
        Ok(v1::Refusal::Unable | v1::Refusal::Unspecified) | Err(_) => Refusal::Unable,
    })
}

/// An HTTP status that someone else got.
pub fn from_status(status: u32) -> Result<u16> {
    let status = u16::try_from(status)
        .ok()
        .filter(|status| (100..=599).contains(status));
    status.ok_or(ConvertError::Bad("origin's status"))
}

/// A source, to the wire.
pub fn source(source: &Source) -> v1::Source {
    v1::Source {
        registry: source.registry.clone(),
        repository: source.repository.clone(),
    }
}

/// A source, its registry's host in the one spelling.
pub fn from_source(source: Option<v1::Source>) -> Result<Source> {
    let v1::Source {
        registry,
        repository,
    } = source.ok_or(ConvertError::Bad("source"))?;
    let registry = canonical_host(&registry).map_err(|_| ConvertError::Bad("registry"))?;
    ensure(
        repository.len() <= MAX_NAME_BYTES && is_repository(&repository),
        "repository",
    )?;
    Ok(Source {
        registry,
        repository,
    })
}

/// A lent token, to the wire.
pub fn token(token: Option<&Bearer>) -> String {
    token.map_or_else(String::new, |token| token.reveal().to_owned())
}

/// A lent token, if there is one.
pub fn from_token(token: &str) -> Result<Option<Bearer>> {
    if token.is_empty() {
        return Ok(None);
    }
    Bearer::new(token)
        .map(Some)
        .ok_or(ConvertError::Bad("token"))
}

/// A role, to the wire.
pub const fn role(role: Role) -> v1::Role {
    match role {
        Role::Peer => v1::Role::Peer,
        Role::Seed => v1::Role::Seed,
        Role::Scheduler => v1::Role::Scheduler,
    }
}

/// A role. The rights of a member rest on its certificate, not on this.
pub fn from_role(role: i32) -> Result<Role> {
    match v1::Role::try_from(role) {
        Ok(v1::Role::Peer) => Ok(Role::Peer),
        Ok(v1::Role::Seed) => Ok(Role::Seed),
        Ok(v1::Role::Scheduler) => Ok(Role::Scheduler),
        Ok(v1::Role::Unspecified) | Err(_) => Err(ConvertError::Bad("role")),
    }
}

/// The id of a member.
pub fn from_peer_id(raw: &[u8]) -> Result<PeerId> {
    PeerId::from_bytes(raw).ok_or(ConvertError::Bad("peer id"))
}

/// A member's id, or nobody's where there are no bytes.
pub fn from_optional_peer_id(raw: &[u8]) -> Result<Option<PeerId>> {
    if raw.is_empty() {
        Ok(None)
    } else {
        from_peer_id(raw).map(Some)
    }
}

/// A member and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The member.
    pub peer: PeerId,
    /// For people.
    pub name: String,
    /// `host:port`, best first.
    pub addresses: Vec<String>,
    /// Its role.
    pub role: Role,
    /// Its zone; empty if it is not known.
    pub zone: String,
}

/// A member, to the wire.
pub fn member(member: &Member) -> v1::Member {
    v1::Member {
        peer_id: member.peer.0.to_vec(),
        name: member.name.clone(),
        addresses: member.addresses.clone(),
        role: role(member.role).into(),
        zone: member.zone.clone(),
    }
}

/// A member.
pub fn from_member(member: v1::Member) -> Result<Member> {
    let v1::Member {
        peer_id,
        name,
        addresses,
        role,
        zone,
    } = member;
    Ok(Member {
        peer: from_peer_id(&peer_id)?,
        name: from_label(name, "name")?,
        addresses: from_addresses(addresses)?,
        role: from_role(role)?,
        zone: from_label(zone, "zone")?,
    })
}

/// A list of members, to the wire.
pub fn member_list<'a>(members: impl IntoIterator<Item = &'a Member>) -> v1::MemberList {
    v1::MemberList {
        members: members.into_iter().map(member).collect(),
    }
}

/// A list of members, of [`MAX_MEMBERS`] at most. Those that make no sense here, as a role of a later version, are left
/// out: one member does not cost us the others.
pub fn from_members(members: Vec<v1::Member>) -> Result<Vec<Member>> {
    ensure(members.len() <= MAX_MEMBERS, "number of members")?;
    Ok(members
        .into_iter()
        .filter_map(|member| from_member(member).ok())
        .collect())
}

/// The other side's name and addresses, once its version is understood.
pub fn from_hello(hello: v1::Hello) -> Result<(String, Vec<String>)> {
    check_version(hello.version)?;
    Ok((
        from_label(hello.name, "name")?,
        from_addresses(hello.addresses)?,
    ))
}

/// A name for people: it ends up in logs and on terminals, so control characters are no part of it.
pub fn from_label(label: String, field: &'static str) -> Result<String> {
    ensure(
        label.len() <= MAX_LABEL_BYTES && !label.chars().any(char::is_control),
        field,
    )?;
    Ok(label)
}

/// Addresses, each `host:port`.
pub fn from_addresses(addresses: Vec<String>) -> Result<Vec<String>> {
    ensure(addresses.len() <= MAX_ADDRESSES, "number of addresses")?;
    ensure(
        addresses.iter().all(|address| is_address(address)),
        "address",
    )?;
    Ok(addresses)
}

/// Ids of removed members as they go over the wire.
pub fn removed(ids: &[PeerId]) -> v1::Removed {
    v1::Removed {
        peer_ids: ids.iter().map(|id| id.0.to_vec()).collect(),
    }
}

/// Ids that are kept at most. Members are removed by hand, so a cluster stays far below.
pub const MAX_REMOVED: usize = 16_384;

/// Ids of removed members, [`MAX_REMOVED`] at most.
pub fn from_removed(removed: &v1::Removed) -> Result<Vec<PeerId>> {
    ensure(
        removed.peer_ids.len() <= MAX_REMOVED,
        "number of removed members",
    )?;
    removed.peer_ids.iter().map(|id| from_peer_id(id)).collect()
}

/// Whether this is `host:port`; an IPv6 address stands in brackets. Names may be such as only a local resolver knows.
fn is_address(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else {
        return false;
    };
    let name = |host: &str| {
        host.bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
    };
    let host_is_legal = match host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
    {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => (1..=MAX_LABEL_BYTES).contains(&host.len()) && name(host),
    };
    host_is_legal && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn algorithm() -> impl Strategy<Value = Algorithm> {
        prop_oneof![Just(Algorithm::Sha256), Just(Algorithm::Sha512)]
    }

    fn task() -> impl Strategy<Value = Digest> {
        (algorithm(), any::<u64>())
            .prop_map(|(algorithm, n)| Digest::of(algorithm, &n.to_be_bytes()))
    }

    fn source_strategy() -> impl Strategy<Value = Source> {
        (
            "[a-z]{1,8}\\.(io|org)(:5000)?",
            "[a-z0-9]{1,8}(/[a-z0-9]{1,8}){0,3}",
        )
            .prop_map(|(registry, repository)| Source {
                registry,
                repository,
            })
            .prop_filter("Docker Hub's other names", |s| {
                canonical_host(&s.registry).as_ref() == Ok(&s.registry)
            })
    }

    fn refusal_strategy() -> impl Strategy<Value = Refusal> {
        prop_oneof![
            Just(Refusal::NotHeld),
            (100..600u16).prop_map(Refusal::Origin),
            Just(Refusal::OriginUnreachable),
            Just(Refusal::Busy),
            Just(Refusal::Draining),
            Just(Refusal::Unable),
        ]
    }

    fn offer(count: u32) -> impl Strategy<Value = Offer> {
        let bits = prop::collection::vec(any::<u8>(), count.div_ceil(8) as usize);
        let pieces = prop::collection::vec(0..count.max(1), 0..=count.min(20) as usize);
        prop_oneof![
            Just(Offer::All),
            pieces.prop_map(Offer::Some),
            bits.prop_map(move |bits| {
                // A bitfield of no bits and a list of no pieces say the same.
                if count == 0 {
                    Offer::Some(Vec::new())
                } else {
                    Offer::Bits(bits)
                }
            })
        ]
    }

    fn signed_strategy(full_count: u32) -> impl Strategy<Value = SignedPrefix> {
        let raw = prop::collection::vec(any::<u8>(), 1..50);
        (
            0..=full_count,
            any::<bool>(),
            any::<u64>(),
            any::<[u8; 16]>(),
            raw,
        )
            .prop_map(move |(count, sealed, signed_at_s, issuer, certificate)| {
                SignedPrefix {
                    count: if sealed { full_count } else { count },
                    sealed,
                    signed_at_s,
                    issuer: PeerId(issuer),
                    registries: vec!["r.example:5000".to_owned()],
                    certificate: certificate.into(),
                    signature: vec![7; SIGNATURE_BYTES],
                }
            })
    }

    fn table() -> impl Strategy<Value = Message> {
        (task(), 0..200 * MIB).prop_flat_map(|(task, size_bytes)| {
            let full_count = PieceLayout::new(size_bytes).count().saturating_sub(1);
            let raw = prop::collection::vec(any::<u8>(), task.algorithm().len_bytes());
            let values = prop::collection::vec(raw, 0..=full_count.min(8) as usize);
            let signed = prop::option::of(signed_strategy(full_count));
            (values, any::<u32>(), signed).prop_map(move |(values, first, signed)| Message::Table {
                task,
                size_bytes,
                first: first % (full_count + 1 - values.len() as u32),
                values: values
                    .iter()
                    .map(|raw| ChainValue::from_bytes(task.algorithm(), raw).unwrap())
                    .collect(),
                signed,
            })
        })
    }

    fn priority_strategy() -> impl Strategy<Value = Priority> {
        (0..=6u32).prop_map(|level| Priority::new(level).unwrap())
    }

    fn purpose_strategy() -> impl Strategy<Value = Purpose> {
        ("[a-z./-]{0,64}", "[a-z@:+]{0,64}", priority_strategy()).prop_map(
            |(application, tag, priority)| {
                let labels = Labels {
                    application: Label::new(&application),
                    tag: Label::new(&tag),
                };
                Purpose { labels, priority }
            },
        )
    }

    fn message() -> impl Strategy<Value = Message> {
        let have = (task(), 0..200 * MIB).prop_flat_map(|(task, size_bytes)| {
            offer(PieceLayout::new(size_bytes).count()).prop_map(move |offer| Message::Have {
                task,
                size_bytes,
                offer,
            })
        });
        let size = prop::option::of(0..=MAX_BLOB_BYTES);
        prop_oneof![
            (
                task(),
                source_strategy(),
                size,
                prop::option::of("[A-Za-z0-9._~+/-]{1,40}={0,2}"),
                purpose_strategy(),
                prop::option::of(0..256u32),
                any::<(bool, bool)>()
            )
                .prop_map(
                    |(task, source, size_bytes, token, purpose, far, (passive, partial))| {
                        let token = token.and_then(|token| Bearer::new(&token));
                        let far = far.map(Share::from_bits);
                        Message::Interest {
                            task,
                            source,
                            size_bytes,
                            token,
                            purpose,
                            far,
                            passive,
                            partial,
                        }
                    }
                ),
            have,
            table(),
            task().prop_map(|task| Message::Working { task }),
            (task(), refusal_strategy())
                .prop_map(|(task, reason)| Message::Unavailable { task, reason }),
            task().prop_map(|task| Message::Leave { task }),
            (
                any::<u32>(),
                task(),
                0..1_000_000u32,
                any::<bool>(),
                priority_strategy()
            )
                .prop_map(|(request, task, piece, prefetch, priority)| {
                    Message::Request {
                        request,
                        task,
                        piece,
                        prefetch,
                        priority,
                    }
                }),
            any::<u32>().prop_map(|request| Message::Cancel { request }),
            (any::<u32>(), refusal_strategy())
                .prop_map(|(request, reason)| Message::Reject { request, reason }),
        ]
    }

    /// An honest table message over 10 pieces, to be spoilt.
    fn honest_table() -> v1::Table {
        v1::Table {
            task: Digest::of(Algorithm::Sha256, b"").to_string(),
            size_bytes: 10 * MIB / 4,
            first: 0,
            values: vec![1; 32 * 9],
            signed: Some(v1::SignedPrefix {
                count: 9,
                sealed: true,
                signed_at_s: 1,
                issuer: vec![1; 16],
                certificate: vec![1; 500],
                signature: vec![1; 64],
                registries: vec!["r.example".to_owned()],
            }),
        }
    }

    fn spoilt_table(
        spoil: impl FnOnce(&mut v1::Table, &mut v1::SignedPrefix),
    ) -> Result<Option<Message>> {
        let mut table = honest_table();
        let mut signed = table.signed.take().unwrap();
        spoil(&mut table, &mut signed);
        table.signed = Some(signed);
        from_peer_message(v1::PeerMessage {
            message: Some(Wire::Table(table)),
        })
    }

    #[test]
    fn a_table_that_no_honest_peer_sends_is_refused() {
        let bad = |field| Err(ConvertError::Bad(field));
        assert!(spoilt_table(|_, _| ()).is_ok());
        assert_eq!(
            spoilt_table(|table, _| table.task = "sha256:12".to_owned()),
            bad("task")
        );
        assert_eq!(
            spoilt_table(|table, _| table.size_bytes = MAX_BLOB_BYTES + 1),
            bad("size")
        );
        assert_eq!(spoilt_table(|table, _| table.first = 1), bad("values"));
        assert_eq!(
            spoilt_table(|table, _| table.first = u32::MAX),
            bad("values")
        );
        assert_eq!(spoilt_table(|table, _| table.values.push(1)), bad("values"));
        assert_eq!(
            spoilt_table(|table, _| table.values.extend([1; 32])),
            bad("values")
        );
        assert_eq!(
            spoilt_table(|_, signed| signed.count = 10),
            bad("signed count")
        );
        assert_eq!(
            spoilt_table(|_, signed| signed.count = 8),
            bad("signed count"),
            "a seal covers everything"
        );
        assert_eq!(
            spoilt_table(|_, signed| signed.issuer.push(1)),
            bad("peer id")
        );
        assert_eq!(
            spoilt_table(|_, signed| signed.signature.clear()),
            bad("signature")
        );
        assert_eq!(
            spoilt_table(|_, signed| signed.certificate.clear()),
            bad("issuer's certificate")
        );
        assert_eq!(
            spoilt_table(|_, signed| signed.certificate = vec![1; MAX_CERTIFICATE_BYTES + 1]),
            bad("issuer's certificate")
        );
        let many = vec![String::new(); MAX_REGISTRIES + 1];
        for registries in [many, vec!["a".repeat(MAX_REGISTRY_BYTES + 1)]] {
            assert_eq!(
                spoilt_table(|_, signed| signed.registries = registries),
                bad("registries")
            );
        }
    }

    #[test]
    fn the_largest_table_is_bounded() {
        assert!(PieceLayout::new(MAX_BLOB_BYTES).count() <= 1 << 20 | 4);
    }

    #[test]
    fn an_offer_is_one_thing_and_fits_the_size() {
        // all, bits, pieces of a task of 10 pieces
        let table = [
            (true, &[][..], &[][..], Ok(Offer::All)),
            (false, &[1, 2][..], &[][..], Ok(Offer::Bits(vec![1, 2]))),
            (false, &[][..], &[0, 9][..], Ok(Offer::Some(vec![0, 9]))),
            (false, &[][..], &[][..], Ok(Offer::Some(vec![]))),
            (false, &[1][..], &[][..], Err(ConvertError::Bad("bits"))),
            (
                false,
                &[1, 2, 3][..],
                &[][..],
                Err(ConvertError::Bad("bits")),
            ),
            (false, &[][..], &[10][..], Err(ConvertError::Bad("pieces"))),
            (
                false,
                &[][..],
                &[1; 11][..],
                Err(ConvertError::Bad("pieces")),
            ),
            (true, &[1, 2][..], &[][..], Err(ConvertError::Bad("offer"))),
            (
                false,
                &[1, 2][..],
                &[1][..],
                Err(ConvertError::Bad("offer")),
            ),
        ];
        for (all, bits, pieces, expected) in table {
            assert_eq!(
                from_offer(10, all, bits.to_vec(), pieces.to_vec()),
                expected
            );
        }
    }

    #[test]
    fn reasons_of_a_later_version_are_understood_as_unable() {
        assert_eq!(from_refusal(99, 0), Ok(Refusal::Unable));
        assert_eq!(from_refusal(0, 0), Ok(Refusal::Unable));
        assert_eq!(
            from_refusal(v1::Refusal::Origin.into(), 404),
            Ok(Refusal::Origin(404))
        );
        for status in [0, 99, 600, 65_536 + 404] {
            assert!(from_refusal(v1::Refusal::Origin.into(), status).is_err());
        }
    }

    #[test]
    fn a_purpose_that_an_older_version_does_not_know_of_is_the_default() {
        assert_eq!(from_purpose(None), Ok(Purpose::default()));
        let told = |application: &str, priority| {
            from_purpose(Some(v1::Purpose {
                application: application.into(),
                tag: String::new(),
                priority,
            }))
        };
        assert_eq!(told("a", Some(99)).unwrap().priority, Priority::LAST);
        assert_eq!(told("two words", None), Err(ConvertError::Bad("label")));
        assert!(told(&"a".repeat(65), None).is_err());
    }

    #[test]
    fn messages_that_are_not_about_pieces_are_left_to_others() {
        let ping = v1::PeerMessage {
            message: Some(Wire::Ping(v1::Ping { nonce: 1 })),
        };
        assert_eq!(from_peer_message(ping), Ok(None));
        assert_eq!(
            from_peer_message(v1::PeerMessage { message: None }),
            Ok(None)
        );
        // Field 99: a message of a later version.
        let unknown = v1::PeerMessage::decode(&[0x9a, 0x06, 0x01, 0x00][..]).unwrap();
        assert_eq!(from_peer_message(unknown), Ok(None));
    }

    #[test]
    fn another_major_version_is_refused_with_a_clear_word() {
        assert_eq!(
            check_version(Some(v1::Version {
                major: 1,
                minor: 99
            })),
            Ok(())
        );
        assert_eq!(check_version(None), Err(ConvertError::Bad("version")));
        let error = check_version(Some(v1::Version { major: 2, minor: 0 })).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the other side speaks protocol version 2, this side 1: upgrade the older one"
        );
    }

    #[test]
    fn a_reason_is_bounded_and_has_no_control_characters() {
        assert_eq!(from_reason("a: b\n\x1b[31m"), "a: b  [31m");
        assert_eq!(
            from_reason(&"é".repeat(MAX_REASON_BYTES)).len(),
            MAX_REASON_BYTES
        );
    }

    #[test]
    fn sources_are_checked_and_get_one_spelling() {
        let source = |registry: &str, repository: &str| {
            from_source(Some(v1::Source {
                registry: registry.to_owned(),
                repository: repository.to_owned(),
            }))
        };
        assert_eq!(
            source("Index.Docker.IO", "library/debian")
                .unwrap()
                .registry,
            "docker.io"
        );
        assert_eq!(
            source("quay.io/foo", "bar"),
            Err(ConvertError::Bad("registry"))
        );
        assert_eq!(source("", "bar"), Err(ConvertError::Bad("registry")));
        assert_eq!(
            source("quay.io", "../bar"),
            Err(ConvertError::Bad("repository"))
        );
        assert_eq!(source("quay.io", ""), Err(ConvertError::Bad("repository")));
        assert_eq!(
            source("quay.io", &"a".repeat(256)),
            Err(ConvertError::Bad("repository"))
        );
        assert_eq!(from_source(None), Err(ConvertError::Bad("source")));
    }

    #[test]
    fn members_are_checked() {
        let honest = Member {
            peer: PeerId([1; 16]),
            name: "node-1".to_owned(),
            addresses: vec![
                "10.0.0.1:6501".to_owned(),
                "[fd00::1]:6501".to_owned(),
                "node_1.example:6501".to_owned(),
            ],
            role: Role::Seed,
            zone: "a".to_owned(),
        };
        assert_eq!(
            from_members(member_list([&honest]).members),
            Ok(vec![honest.clone()])
        );
        let spoilt = |spoil: fn(&mut v1::Member)| {
            let mut wire = member(&honest);
            spoil(&mut wire);
            from_member(wire).unwrap_err().to_string()
        };
        assert_eq!(spoilt(|m| m.peer_id.push(1)), "bad peer id");
        assert_eq!(spoilt(|m| m.name = "\u{1b}[2J".to_owned()), "bad name");
        assert_eq!(spoilt(|m| m.zone = "z".repeat(256)), "bad zone");
        assert_eq!(spoilt(|m| m.role = 0), "bad role");
        assert_eq!(spoilt(|m| m.role = 99), "bad role");
        assert_eq!(
            spoilt(|m| m.addresses = vec!["a:1".to_owned(); 33]),
            "bad number of addresses"
        );
        for address in [
            "",
            "host",
            "host:",
            "host:0",
            "host:65536",
            ":1",
            "fd00::1:6501",
            "a b:1",
            "a:1:1",
            "a/b:1",
        ] {
            let wire = v1::Member {
                addresses: vec![address.to_owned()],
                ..member(&honest)
            };
            assert_eq!(
                from_member(wire),
                Err(ConvertError::Bad("address")),
                "{address}"
            );
        }
        let later = v1::Member {
            role: 99,
            ..member(&honest)
        };
        assert_eq!(
            from_members(vec![later, member(&honest)]),
            Ok(vec![honest.clone()])
        );
        assert!(from_members(vec![member(&honest); MAX_MEMBERS + 1]).is_err());
    }

    proptest! {
        #[test]
        fn what_is_sent_is_what_arrives(message in message()) {
            let raw = peer_message(&message).encode_to_vec();
            prop_assert_eq!(from_peer_message(v1::PeerMessage::decode(&raw[..]).unwrap()), Ok(Some(message)));
        }

        #[test]
        fn no_bytes_make_it_panic(raw in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = v1::PeerMessage::decode(&raw[..]) {
                let _ = from_peer_message(message);
            }
        }

        #[test]
        fn a_damaged_message_makes_it_say_no_or_something_legal(
            message in message(), place in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>(),
        ) {
            let mut raw = peer_message(&message).encode_to_vec();
            let place = place.index(raw.len());
            raw[place] = byte;
            raw.truncate(if cut { place } else { raw.len() });
            let Ok(wire) = v1::PeerMessage::decode(&raw[..]) else { return Ok(()) };
            // A message that is let in can be passed on and is let in again.
            if let Ok(Some(message)) = from_peer_message(wire) {
                prop_assert_eq!(from_peer_message(peer_message(&message)), Ok(Some(message)));
            }
        }
    }
}
