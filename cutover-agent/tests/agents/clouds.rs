//! Names turned at a cloud. The cloud is played by the test, with the two answers of Route 53's interface that a change
//! needs: there is no cloud to be had here, and the others' interfaces cannot be asked at another address.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};

use cutover_agent::names::cloud::{Cloud, CloudZones};
use cutover_agent::names::{Name, Names};
use cutover_protocol::door::Redirect;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

const KEYS: &str =
    "[default]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = an/example+of=one\n";
const ZONES: &str = "<ListHostedZonesByNameResponse><HostedZones><HostedZone><Id>/hostedzone/Z1</Id>\
    <Name>example.org.</Name><CallerReference>1</CallerReference><Config><PrivateZone>false</PrivateZone></Config>\
    <ResourceRecordSetCount>2</ResourceRecordSetCount></HostedZone></HostedZones><IsTruncated>false</IsTruncated>\
    <MaxItems>100</MaxItems></ListHostedZonesByNameResponse>";
const CHANGED: &str = "<ChangeResourceRecordSetsResponse><ChangeInfo><Id>/change/C1</Id><Status>PENDING</Status>\
    <SubmittedAt>2026-01-01T00:00:00Z</SubmittedAt></ChangeInfo></ChangeResourceRecordSetsResponse>";
const DENIED: &str = "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code>\
    <Message>not this zone</Message></Error></ErrorResponse>";

/// One request: its first line, what it is signed with, its body.
#[derive(Clone)]
struct Asked {
    line: String,
    authorization: String,
    body: String,
}

struct Route53 {
    at: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Route53 {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Route53 {
    /// Answers changes with this status.
    async fn start(status: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, status, Arc::clone(&seen)));
            }
        });
        Self { at, asked, task }
    }

    fn names(&self, folder: &Path, addresses: [&[IpAddr]; 2]) -> Names {
        let name = Name {
            name: "www.example.org".to_owned(),
            zone: "example.org".to_owned(),
            ttl_s: 3600,
            source: addresses[0].to_vec(),
            target: addresses[1].to_vec(),
        };
        let endpoint = format!("http://{}", self.at);
        let zones = CloudZones::new(Cloud::Route53, Path::new("keys"), KEYS, Some(&endpoint));
        Names::new(folder, vec![name], 30, Some(Arc::new(zones.unwrap()))).unwrap()
    }

    fn changes(&self) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        let changes = asked.iter().filter(|asked| asked.line.starts_with("POST"));
        changes.cloned().collect()
    }
}

async fn answer(stream: TcpStream, status: &'static str, seen: Arc<Mutex<Vec<Asked>>>) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut asked = Asked {
            line: String::new(),
            authorization: String::new(),
            body: String::new(),
        };
        if stream.read_line(&mut asked.line).await.unwrap_or(0) == 0 {
            return;
        }
        let mut length = 0;
        loop {
            let mut field = String::new();
            stream.read_line(&mut field).await.unwrap();
            match field.trim().split_once(": ") {
                None => break,
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.parse().unwrap();
                }
                Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                    value.clone_into(&mut asked.authorization);
                }
                Some(_) => {}
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        asked.body = String::from_utf8(body).unwrap();
        let (status, text) = match (asked.line.starts_with("GET"), status) {
            (true, _) => ("200 OK", ZONES),
            (false, "200 OK") => (status, CHANGED),
            (false, _) => (status, DENIED),
        };
        seen.lock().unwrap().push(asked);
        let length = text.len();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/xml\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all((head + text).as_bytes()).await.unwrap();
    }
}

fn values(body: &str) -> Vec<&str> {
    let values = body.split("<Value>").skip(1);
    values.map(|rest| rest.split('<').next().unwrap()).collect()
}

#[tokio::test]
async fn each_family_of_a_name_is_replaced_by_one_signed_change() {
    let (cloud, folder) = (Route53::start("200 OK").await, tempfile::tempdir().unwrap());
    let source: [IpAddr; 3] = [
        [192, 0, 2, 1].into(),
        [192, 0, 2, 2].into(),
        "2001:db8::1".parse().unwrap(),
    ];
    let names = cloud.names(folder.path(), [&source, &source]);
    let hop = "hop-1".parse().unwrap();
    names
        .prepare(&hop, (Redirect::AtOnce, 60), Vec::new())
        .await
        .unwrap();
    let changes = cloud.changes();
    let [four, six] = changes.as_slice() else {
        panic!("{} changes", changes.len());
    };
    assert!(
        four.line
            .starts_with("POST /2013-04-01/hostedzone/Z1/rrset ")
    );
    assert!(
        four.authorization
            .starts_with("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/"),
        "{}",
        four.authorization
    );
    for (change, kind, wanted) in [
        (four, "A", vec!["192.0.2.1", "192.0.2.2"]),
        (six, "AAAA", vec!["2001:db8::1"]),
    ] {
        let body = &change.body;
        assert!(body.contains("<Action>UPSERT</Action>"), "{body}");
        assert!(body.contains("<Name>www.example.org"), "{body}");
        assert!(body.contains(&format!("<Type>{kind}</Type>")), "{body}");
        assert!(body.contains("<TTL>30</TTL>"), "{body}");
        assert_eq!(values(body), wanted);
    }
}

#[tokio::test]
async fn after_the_commit_the_name_leads_to_the_target_and_lives_long_again() {
    let (cloud, folder) = (Route53::start("200 OK").await, tempfile::tempdir().unwrap());
    let names = cloud.names(
        folder.path(),
        [&[[192, 0, 2, 1].into()], &[[198, 51, 100, 1].into()]],
    );
    let hop = "hop-1".parse().unwrap();
    names
        .prepare(&hop, (Redirect::AtOnce, 60), Vec::new())
        .await
        .unwrap();
    names.commit(&hop).await.unwrap();
    names.retire().await.unwrap();
    let last = cloud.changes().pop().unwrap().body;
    assert_eq!(values(&last), ["198.51.100.1"]);
    assert!(last.contains("<TTL>3600</TTL>"), "{last}");
}

#[tokio::test]
async fn a_cloud_that_says_no_is_quoted() {
    let (cloud, folder) = (
        Route53::start("403 Forbidden").await,
        tempfile::tempdir().unwrap(),
    );
    let names = cloud.names(
        folder.path(),
        [&[[192, 0, 2, 1].into()], &[[198, 51, 100, 1].into()]],
    );
    let told = names
        .prepare(
            &"hop-1".parse().unwrap(),
            (Redirect::AtOnce, 60),
            Vec::new(),
        )
        .await;
    let message = told.unwrap_err();
    assert!(
        message.starts_with("www.example.org: Route 53 did not change the zone: "),
        "{message}"
    );
}

#[test]
fn a_key_file_that_is_none_of_the_clouds_is_told_before_any_hop() {
    let tell = |cloud, text| {
        let made = CloudZones::new(cloud, Path::new("/etc/dns.key"), text, None);
        made.unwrap_err().to_string()
    };
    assert_eq!(
        tell(Cloud::Cloudflare, " \n"),
        "/etc/dns.key is empty: put the token in it that Cloudflare gave out for changing this zone"
    );
    assert_eq!(
        tell(Cloud::Route53, "aws_access_key_id = AKIDEXAMPLE\n"),
        "/etc/dns.key has no line `aws_secret_access_key = ...`: write it as an AWS credentials file, for a user that \
         may change this zone"
    );
}

#[test]
fn every_cloud_can_be_had_with_its_key() {
    for cloud in [Cloud::Cloudflare, Cloud::Digitalocean, Cloud::Hetzner] {
        CloudZones::new(cloud, Path::new("key"), "a-token\n", None).unwrap();
    }
    CloudZones::new(Cloud::Route53, Path::new("key"), KEYS, None).unwrap();
}
