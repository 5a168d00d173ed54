//! Applications, tags and priorities: urgent pulls come first, limited ones keep to their limit, and no registry hears
//! of it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use hawker_conformance::lab::{Hawker, HawkerPlan, Request};
use hawker_conformance::origin::{Blob, Content, Origin};
use hawker_conformance::scene::{
    Configured, REPOSITORY, blob_path, join, right, until, with_origin,
};

const MIB: u64 = 1 << 20;

const APPLICATION: &str = "X-Hawker-Application";
const TAG: &str = "X-Hawker-Tag";
const PRIORITY: &str = "X-Hawker-Priority";

fn ask(node: &Hawker, origin: &Origin, blob: &Blob, headers: &[(&str, &str)]) -> Request {
    let request = node
        .request(origin.address(), &blob_path(blob))
        .discard()
        .within(Duration::from_secs(90));
    headers.iter().fold(request, |request, (name, value)| {
        request.header(name, *value)
    })
}

/// How long it takes to get a blob.
fn pull(node: &Hawker, origin: &Origin, blob: &Blob, headers: &[(&str, &str)]) -> Result<Duration> {
    Ok(right(ask(node, origin, blob, headers).send(node.host())?, blob)?.total)
}

fn blob(origin: &Origin, seed: u64, size_bytes: u64) -> Result<Blob> {
    Ok(origin.add_blob(REPOSITORY, Content::generated(seed, size_bytes))?)
}

#[test]
fn a_seed_sends_what_is_urgent_first_and_the_rest_goes_on() -> Result<()> {
    with_origin(|lab, origin| {
        let host = lab.host("seed")?;
        let plan = HawkerPlan::up(&host).flag("--upload-slots", "2");
        let mut seed = Configured::start(plan, &host, origin, "")?;
        let (long, short) = (blob(origin, 0, 40 * MIB)?, blob(origin, 1, 16 * MIB)?);
        for blob in [&long, &short] {
            pull(&seed.node, origin, blob, &[])?;
        }
        seed.set("[rates]\nupload = \"4MB\"\n")?;
        let rules = "[[application]]\nname = \"batch\"\npriority = 6\n\
                     [[application]]\nname = \"shop\"\npriority = 0\n";
        let batch = seed.join(lab, origin, "batch", rules)?.node;
        let shop = seed.join(lab, origin, "shop", rules)?.node;
        std::thread::scope(|scope| {
            let slow = scope.spawn(|| pull(&batch, origin, &long, &[(APPLICATION, "batch")]));
            std::thread::sleep(Duration::from_secs(2));
            // 16 MiB at 4 MB/s are 4.2 s alone, and twice that at half the rate.
            let urgent = pull(&shop, origin, &short, &[(APPLICATION, "shop")])?;
            ensure!(
                urgent < Duration::from_millis(6500),
                "the urgent one takes {urgent:?}"
            );
            let slow = join(slow.join())?;
            ensure!(
                slow < Duration::from_secs(30),
                "the other one takes {slow:?}"
            );
            Ok(())
        })
    })
}

#[test]
fn an_application_and_a_tag_keep_to_their_rates_at_the_node_and_at_the_seed_and_these_change_at_sighup()
-> Result<()> {
    with_origin(|lab, origin| {
        // 8 MiB at 2 MB/s are 4 s.
        let held = |what: &str, took: Duration| {
            ensure!(
                (3..7).contains(&took.as_secs()),
                "{what}: it takes {took:?}"
            );
            Ok(())
        };
        let free = |what: &str, took: Duration| {
            ensure!(took < Duration::from_secs(2), "{what}: it takes {took:?}");
            Ok(())
        };
        let batch = [(APPLICATION, "batch")];
        let host = lab.host("seed")?;
        let rules = "[[application]]\nname = \"batch\"\norigin = \"2MB\"\n";
        let mut seed = Configured::start(HawkerPlan::up(&host), &host, origin, rules)?;
        let all = (0..5)
            .map(|seed| blob(origin, seed, 8 * MIB))
            .collect::<Result<Vec<_>>>()?;
        held(
            "the origin of batch",
            pull(&seed.node, origin, &all[0], &batch)?,
        )?;
        free(
            "the origin of others",
            pull(&seed.node, origin, &all[1], &[])?,
        )?;

        seed.set("[[application]]\ntag = \"night\"\nupload = \"2MB\"\n")?;
        for blob in &all[2..] {
            pull(&seed.node, origin, blob, &batch)?;
        }
        let mut node = seed.join(lab, origin, "node", "")?;
        held(
            "the seed's upload of a tag",
            pull(&node.node, origin, &all[0], &[(TAG, "night")])?,
        )?;
        free(
            "the seed's upload of others",
            pull(&node.node, origin, &all[1], &[(TAG, "day")])?,
        )?;

        let registry = origin.address();
        node.set(&format!(
            "[[application]]\nname = \"batch\"\nmatch = \"{registry}/*\"\ndownload = \"2MB\"\n"
        ))?;
        held(
            "the node's download by its repository",
            pull(&node.node, origin, &all[2], &[])?,
        )?;
        free(
            "what says that it is another's",
            pull(&node.node, origin, &all[3], &[(APPLICATION, "shop")])?,
        )?;
        node.set("")?;
        free("without rules", pull(&node.node, origin, &all[4], &batch)?)?;

        let counted = seed.node.metric(
            "hawker_application_bytes_total",
            &["application=\"batch\"", "origin"],
        )?;
        ensure!(
            counted >= 8e6,
            "{counted} bytes are counted for batch at the seed"
        );
        let counted = node.node.metric(
            "hawker_application_bytes_total",
            &["application=\"batch\"", "served"],
        )?;
        ensure!(
            counted >= 8e6,
            "{counted} bytes are counted for batch at the node"
        );
        Ok(())
    })
}

#[test]
fn an_application_with_as_many_requests_as_it_may_is_told_to_come_again_and_no_registry_hears_of_it()
-> Result<()> {
    with_origin(|lab, origin| {
        let host = lab.host("node")?;
        let rules = "[[application]]\nname = \"batch\"\nrequests = 1\n";
        let node = Configured::start(HawkerPlan::proxy(&host), &host, origin, rules)?.node;
        let (long, short) = (blob(origin, 0, 32 * MIB)?, blob(origin, 1, MIB)?);
        let all = [(APPLICATION, "batch"), (TAG, "night"), (PRIORITY, "5")];
        let host = node.host();
        std::thread::scope(|scope| {
            let slow = ask(&node, origin, &long, &all).slowly(8 * MIB);
            let slow = scope.spawn(move || slow.send(host));
            let begun = Instant::now();
            until(Duration::from_secs(5), "the first one runs", || {
                Ok(node.metric("hawker_application_bytes_total", &["served"])? > 0.0)
            })?;
            let refused = ask(&node, origin, &short, &all).send(node.host())?;
            ensure!(
                begun.elapsed() < Duration::from_secs(4),
                "the first one may be over"
            );
            ensure!(
                refused.status == 429 && refused.header("retry-after").is_some(),
                "{refused:?}"
            );
            pull(&node, origin, &short, &[(APPLICATION, "shop")])?;
            right(join(slow.join())?, &long)?;
            Ok(())
        })?;
        pull(&node, origin, &short, &all)?;
        let refused = node.metric(
            "hawker_application_refused_total",
            &["application=\"batch\""],
        )?;
        ensure!(refused == 1.0, "{refused} refused");
        for (name, value) in [(PRIORITY, "7"), (APPLICATION, "two words")] {
            let answer = ask(&node, origin, &short, &[(name, value)]).send(node.host())?;
            ensure!(
                answer.status == 400 && answer.text().contains(name),
                "{name}: {answer:?}"
            );
        }
        let told: Vec<_> = origin
            .log()
            .into_iter()
            .flat_map(|entry| entry.fields)
            .collect();
        ensure!(
            told.iter()
                .any(|name| name == "user-agent" || name == "via"),
            "fields are noted: {told:?}"
        );
        ensure!(
            !told.iter().any(|name| name.starts_with("x-hawker")),
            "{told:?}"
        );
        Ok(())
    })
}
