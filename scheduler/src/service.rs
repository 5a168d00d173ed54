//! The gRPC service for members and joiners. The certificate tells the caller, never a message.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use hawker_api::convert::{self, ConvertError, Member};
use hawker_api::v1;
use hawker_api::v1::from_peer::Event as Said;
use hawker_core::message::Role;
use hawker_core::piece::{PeerId, PieceTable};
use hawker_core::place::Place;
use hawker_core::swarm::{Holding, Input, Registration, ReportKind, Terms};
use hawker_identity::member::Identity;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::Stream as AsyncStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use crate::advertise::AllowedAddresses;
use crate::driver::{Event, Handle, STREAM_QUEUE, Stream};
use crate::listener::Caller;
use crate::standing::{by_address, removed};
use crate::{LiveSettings, Numbers};
use hawker_identity::authority::{Authority, Refusal};

/// How long a stream may go on before it says who speaks.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(10);
/// Joins that are looked at at once; more wait.
pub(crate) const JOINS_AT_ONCE: usize = 16;
/// Refused joins are logged this often at most: strangers cause them.
const REFUSAL_LOGGED_EVERY: Duration = Duration::from_secs(1);

/// Both services.
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) driver: Handle,
    /// Checks what issuers signed.
    pub(crate) identity: Identity,
    pub(crate) authority: Option<Arc<Authority>>,
    /// The cluster's name.
    pub(crate) cluster: String,
    pub(crate) numbers: Arc<Numbers>,
    pub(crate) streams: Arc<AtomicU64>,
    /// The places of members that name none, among others.
    pub(crate) live: Arc<ArcSwap<LiveSettings>>,
    /// Addresses that members may advertise besides the one that they connect from.
    pub(crate) allowed_addresses: Arc<AllowedAddresses>,
    /// Bounds the joins that are looked at at once.
    pub(crate) joins: Arc<Semaphore>,
    pub(crate) refusals: Arc<Mutex<Refusals>>,
}

/// When a refused join was logged last, and how many were not logged since.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    logged_at: Option<Instant>,
    silent: u64,
}

fn anybody<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().copied();
    match caller {
        Some(caller) if caller.is_removed => Err(removed()),
        Some(caller) => Ok(caller),
        None => Err(Status::internal(
            "the connection's end is not known; this is a bug in Hawker",
        )),
    }
}

fn caller<T>(request: &Request<T>) -> Result<(Caller, PeerId, Role), Status> {
    let caller = anybody(request)?;
    let (peer, role) = caller.member.ok_or_else(|| {
        Status::unauthenticated("this needs a member's certificate: join the cluster first")
    })?;
    Ok((caller, peer, role))
}

fn bad(error: &ConvertError) -> Status {
    Status::invalid_argument(error.to_string())
}

#[tonic::async_trait]
impl v1::scheduler_server::Scheduler for Service {
    type TrackStream = Pin<Box<dyn AsyncStream<Item = Result<v1::ToPeer, Status>> + Send>>;

    async fn track(
        &self,
        request: Request<Streaming<v1::FromPeer>>,
    ) -> Result<Response<Self::TrackStream>, Status> {
        let (caller, peer, _) = caller(&request)?;
        let (outgoing, incoming) = mpsc::channel(STREAM_QUEUE);
        let id = self.streams.fetch_add(1, Relaxed);
        let stream = Stream {
            id,
            outgoing,
            over: CancellationToken::new(),
        };
        let service = self.clone();
        // The task ends with the stream: the client's end of it, the driver's word, or the connection's keepalive.
        tokio::spawn(async move {
            let outgoing = stream.outgoing.clone();
            if let Err(status) = listen(&service, caller, stream, request.into_inner()).await {
                debug!(%peer, %status, "a stream ended");
                let _ = outgoing.try_send(Err(status));
            }
            service
                .driver
                .send(Event::Closed { peer, stream: id })
                .await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(incoming))))
    }

    async fn members(
        &self,
        request: Request<v1::MembersRequest>,
    ) -> Result<Response<v1::MembersReply>, Status> {
        caller(&request)?;
        let members = self.driver.states().await.ok_or_else(stopping)?;
        Ok(Response::new(v1::MembersReply { members }))
    }
}

fn stopping() -> Status {
    Status::unavailable("this scheduler is stopping; ask another")
}

/// Reads a peer's stream to its end.
async fn listen(
    service: &Service,
    caller: Caller,
    stream: Stream,
    mut messages: Streaming<v1::FromPeer>,
) -> Result<(), Status> {
    let Service {
        driver, identity, ..
    } = service;
    let Some((peer, role)) = caller.member else {
        return Ok(());
    };
    let over = stream.over.clone();
    let first = timeout(REGISTER_TIMEOUT, messages.message()).await;
    let first = first
        .map_err(|_| Status::deadline_exceeded("the stream did not begin with a registration"))??;
    let Some(Said::Register(register)) = first.and_then(|message| message.event) else {
        return Err(Status::invalid_argument(
            "the stream does not begin with a registration",
        ));
    };
    let (member, registration, refused, names_no_place) = registered(service, &caller, register)
        .await
        .map_err(|error| bad(&error))?;
    if !refused.is_empty() {
        warn!(
            %peer, name = member.name, from = %caller.from.ip(), addresses = ?refused,
            "a member advertises addresses that it does not connect from: they are not passed on. If they are right, as behind \
             NAT, allow them with --allow-advertise"
        );
    }
    let opened = Event::Opened {
        member,
        registration,
        stream,
        refused_addresses: refused,
        names_no_place,
        certificate_until_s: caller.certificate_until_s,
    };
    if !driver.send(opened).await {
        return Err(stopping());
    }
    loop {
        let message = tokio::select! {
            () = over.cancelled() => return Ok(()),
            message = messages.message() => message?,
        };
        let Some(message) = message else {
            return Ok(());
        };
        if let Some(Said::Configured(v1::Configured { revision, error })) = message.event {
            let error = convert::from_reason(&error);
            if !driver
                .send(Event::Configured {
                    peer,
                    revision,
                    error,
                })
                .await
            {
                return Err(stopping());
            }
            continue;
        }
        for input in inputs(identity, (peer, role), message).map_err(|error| bad(&error))? {
            if !driver.send(Event::Said(input)).await {
                return Err(stopping());
            }
        }
    }
}

/// The content of a registration, the addresses in it that are not passed on, and whether it names no place.
async fn registered(
    service: &Service,
    caller: &Caller,
    register: v1::Register,
) -> Result<(Member, Registration, Vec<String>, bool), ConvertError> {
    let (peer, role) = caller.member.ok_or(ConvertError::Bad("caller"))?;
    convert::check_version(register.version)?;
    let addresses = convert::from_addresses(register.addresses)?;
    let (from, local) = (caller.from.ip(), caller.local.ip());
    let (addresses, refused) = service.allowed_addresses.sort(addresses, from, local).await;
    let said = Place {
        zone: convert::from_label(register.zone, "zone")?.into(),
        rack: convert::from_label(register.rack, "rack")?.into(),
    };
    let names_none = said.is_unknown();
    let place = match names_none {
        true => by_address(&service.live.load().networks, &addresses).unwrap_or_default(),
        false => said,
    };
    let name = convert::from_label(register.name, "name")?;
    let member = Member {
        peer,
        name,
        addresses,
        role,
        zone: place.zone.to_string(),
    };
    let registration = Registration {
        peer,
        role,
        place,
        upload_slots: register.upload_slots,
        upload_rate_bytes: register.upload_rate_bytes,
        reads_origins: register.reads_origins,
    };
    Ok((member, registration, refused, names_none))
}

/// The inputs in a message. One that only a later version knows has none.
fn inputs(
    identity: &Identity,
    (peer, role): (PeerId, Role),
    message: v1::FromPeer,
) -> Result<Vec<Input>, ConvertError> {
    Ok(match message.event {
        None => Vec::new(),
        Some(Said::Register(_)) => return Err(ConvertError::Bad("second registration")),
        Some(Said::Holdings(v1::Holdings {
            replaces_all,
            holdings,
        })) => {
            let holdings = holdings
                .into_iter()
                .map(holding)
                .collect::<Result<_, _>>()?;
            vec![Input::Holdings {
                peer,
                replaces_all,
                holdings,
            }]
        }
        Some(Said::Want(want)) => vec![Input::Want {
            peer,
            task: convert::from_task(&want.task)?,
            size_bytes: Some(want.size_bytes).filter(|size| *size > 0),
            again: want.again,
            reads: want.reads,
            terms: Terms {
                issuer: convert::from_optional_peer_id(&want.issuer)?,
                guest: want.guest,
                partial: want.partial,
                purpose: convert::from_purpose(want.purpose)?,
            },
        }],
        Some(Said::Forget(forget)) => vec![Input::Forget {
            peer,
            task: convert::from_task(&forget.task)?,
        }],
        Some(Said::Reports(v1::Reports { reports })) => reports
            .iter()
            .map(|one| report((peer, role), one))
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect(),
        // The reader of the stream takes it.
        Some(Said::Configured(_)) => Vec::new(),
        Some(Said::Contradiction(said)) => {
            contradicted(identity, peer, said)?.into_iter().collect()
        }
    })
}

/// The guilt that two tables prove, if both signatures hold.
fn contradicted(
    identity: &Identity,
    reporter: PeerId,
    said: v1::Contradiction,
) -> Result<Option<Input>, ConvertError> {
    let (one, other) = (
        convert::from_whole_table(said.one)?,
        convert::from_whole_table(said.other)?,
    );
    let is_signed = |table: &PieceTable| {
        table.signed().is_some_and(|signed| {
            identity
                .check(signed, &table.statement_of(signed))
                .is_some()
        })
    };
    let issuer = one
        .contradiction(&other)
        .filter(|_| is_signed(&one) && is_signed(&other));
    match issuer {
        Some(issuer) => {
            warn!(%issuer, task = %one.task(), %reporter, "an issuer contradicts itself")
        }
        None => warn!(%reporter, task = %one.task(), "two tables that prove nothing"),
    }
    Ok(issuer.map(Input::Contradicted))
}

fn holding(holding: v1::Holding) -> Result<Holding, ConvertError> {
    Ok(Holding {
        task: convert::from_task(&holding.task)?,
        size_bytes: holding.size_bytes,
        pieces: holding.pieces,
        complete: holding.complete,
    })
}

/// A member's own report, or one that another scheduler vouches for.
fn report(
    (from, role): (PeerId, Role),
    report: &v1::Report,
) -> Result<Option<Input>, ConvertError> {
    use v1::report::Kind;
    let kind = match report.kind() {
        Kind::WrongBytes => ReportKind::WrongBytes,
        Kind::Stalled => ReportKind::Stalled,
        Kind::NotHeld => ReportKind::NotHeld,
        Kind::Failed => ReportKind::Failed,
        Kind::Served => ReportKind::Served(report.bytes),
        Kind::Unspecified => return Ok(None),
    };
    let reporter = convert::from_optional_peer_id(&report.reporter)?;
    let is_vouched_for = role == Role::Scheduler && reporter.is_some();
    Ok(Some(Input::Report {
        reporter: reporter.filter(|_| is_vouched_for).unwrap_or(from),
        peer: convert::from_peer_id(&report.peer_id)?,
        task: convert::from_task(&report.task)?,
        kind,
        is_vouched_for,
    }))
}

#[tonic::async_trait]
impl v1::authority_server::Authority for Service {
    async fn join(
        &self,
        request: Request<v1::JoinRequest>,
    ) -> Result<Response<v1::JoinReply>, Status> {
        let from = anybody(&request)?.from.ip();
        let request = request.into_inner();
        convert::check_version(request.version).map_err(|error| bad(&error))?;
        let name = convert::from_label(request.name, "name").map_err(|error| bad(&error))?;
        let (id, secret, certificate_request) = (
            request.token_id,
            request.token_secret,
            request.certificate_request,
        );
        let token = id.clone();
        let node = name.clone();
        let turn = Arc::clone(&self.joins)
            .acquire_owned()
            .await
            .map_err(|_| stopping())?;
        let joined = self
            .with_authority(move |authority| {
                let _turn = turn;
                authority.join(
                    &id,
                    &secret,
                    &certificate_request,
                    &node,
                    from,
                    SystemTime::now(),
                )
            })
            .await;
        let (certificate, role) = joined.inspect_err(|status| {
            self.numbers.joins_refused.fetch_add(1, Relaxed);
            self.log_refusal(&name, from, status.message());
        })?;
        self.numbers.joins.fetch_add(1, Relaxed);
        info!(name, token, %role, "a node has joined");
        self.reply(certificate.to_vec(), role).await
    }

    async fn renew(
        &self,
        request: Request<v1::RenewRequest>,
    ) -> Result<Response<v1::JoinReply>, Status> {
        let (_, peer, role) = caller(&request)?;
        let request = request.into_inner();
        convert::check_version(request.version).map_err(|error| bad(&error))?;
        let renewed = move |authority: &Authority| {
            authority.renew(
                (peer, role),
                &request.certificate_request,
                SystemTime::now(),
            )
        };
        let certificate = self.with_authority(renewed).await?;
        info!(%peer, %role, "a certificate was renewed");
        self.reply(certificate.to_vec(), role).await
    }
}

impl Service {
    fn log_refusal(&self, name: &str, from: IpAddr, reason: &str) {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if refusals
            .logged_at
            .is_some_and(|at| at.elapsed() < REFUSAL_LOGGED_EVERY)
        {
            refusals.silent += 1;
            return;
        }
        let others = std::mem::take(&mut refusals.silent);
        refusals.logged_at = Some(Instant::now());
        warn!(name, %from, reason, others, "a node may not join");
    }

    /// Runs something that reads and writes the authority's files.
    async fn with_authority<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Authority) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Status> {
        let Some(authority) = self.authority.clone() else {
            return Err(self.no_authority().await);
        };
        let done = tokio::task::spawn_blocking(move || work(&authority)).await;
        done.map_err(|_| Status::internal("the authority failed; see its log"))?
            .map_err(|refusal| refused(&refusal))
    }

    async fn no_authority(&self) -> Status {
        let list = self.driver.list().await.unwrap_or_default();
        // We come first in the list.
        let schedulers = list
            .iter()
            .skip(1)
            .filter(|member| member.role == Role::Scheduler);
        let addresses: Vec<&str> = schedulers
            .flat_map(|member| member.addresses.iter().map(String::as_str))
            .collect();
        Status::failed_precondition(match addresses.is_empty() {
            true => {
                "this scheduler has no authority: ask the one where the cluster was created".into()
            }
            false => format!(
                "this scheduler has no authority: ask {}",
                addresses.join(" or ")
            ),
        })
    }

    async fn reply(
        &self,
        certificate: Vec<u8>,
        role: Role,
    ) -> Result<Response<v1::JoinReply>, Status> {
        let Some(authority) = &self.authority else {
            return Err(self.no_authority().await);
        };
        let members = self.driver.list().await.ok_or_else(stopping)?;
        Ok(Response::new(v1::JoinReply {
            certificate,
            authority: authority.certificate().to_vec(),
            cluster: self.cluster.clone(),
            role: convert::role(role).into(),
            members: Some(convert::member_list(&members)),
        }))
    }
}

fn refused(refusal: &Refusal) -> Status {
    let text = refusal.to_string();
    match refusal {
        Refusal::Unknown
        | Refusal::WrongSecret
        | Refusal::Spent
        | Refusal::Expired
        | Refusal::Removed => Status::unauthenticated(text),
        Refusal::Request(_) => Status::invalid_argument(text),
        Refusal::Busy => Status::resource_exhausted(text),
        Refusal::Disk(_) => Status::internal(text),
    }
}
