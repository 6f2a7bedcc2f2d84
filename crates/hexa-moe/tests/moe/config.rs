//! Configurations: defaults, files, refusals.

use burn::config::Config;
use hexa_moe::backends::Cpu;
use hexa_moe::{Activation, BalanceConfig, MoeConfig, RouterConfig};

fn parse(json: &str) -> Result<MoeConfig, String> {
    MoeConfig::load_binary(json.as_bytes()).map_err(|error| error.to_string())
}

#[test]
fn missing_fields_have_the_defaults_of_new() {
    let config = parse(r#"{"d_model": 8, "d_ff": 32, "num_experts": 4}"#).unwrap();
    assert_eq!(config, MoeConfig::new(8, 32, 4));
}

#[test]
fn a_file_gives_back_what_was_saved() {
    let config = MoeConfig::new(8, 32, 4)
        .with_top_k(3)
        .with_router(RouterConfig::cosine())
        .with_activation(Activation::SwiGlu)
        .with_balance(BalanceConfig::load_importance(0.1).with_z_loss(0.2))
        .with_train_fc2_bias(false)
        .with_shared_d_ff(16);
    let json = burn::config::config_to_json(&config);
    assert_eq!(parse(&json).unwrap(), config);
}

#[test]
fn the_cosine_router_has_published_defaults() {
    let json = r#"{"d_model": 8, "d_ff": 32, "num_experts": 4, "router": {"kind": "cosine"}}"#;
    assert_eq!(parse(json).unwrap().router, RouterConfig::cosine());
}

#[test]
fn unknown_keys_and_missing_widths_are_refused() {
    for json in [
        r#"{"d_model": 8, "d_ff": 32, "num_experts": 4, "topk": 2}"#,
        r#"{"d_model": 8, "d_ff": 32, "num_experts": 4, "balance": {"gshardd": 1.0}}"#,
        r#"{"d_model": 8, "d_ff": 32, "num_experts": 4, "router": {"kind": "cosine", "dims": 3}}"#,
        r#"{"d_model": 8, "d_ff": 32, "num_experts": 4, "router": {"kind": "hash"}}"#,
        r#"{"d_model": 8, "num_experts": 4}"#,
        r#"{"d_model": -8, "d_ff": 32, "num_experts": 4}"#,
    ] {
        assert!(parse(json).is_err(), "{json}");
    }
}

#[test]
fn bad_values_are_refused_by_name() {
    let ok = || MoeConfig::new(8, 32, 4);
    let cosine = |dim, init_temperature| RouterConfig::Cosine {
        dim,
        init_temperature,
    };
    let cases: Vec<(MoeConfig, &str)> = vec![
        (MoeConfig::new(0, 32, 4), "d_model is 0"),
        (MoeConfig::new(8, 0, 4), "d_ff is 0"),
        (MoeConfig::new(8, 32, 0), "num_experts is 0"),
        (
            MoeConfig::new(1 << 30, 1 << 30, 1 << 10),
            "d_ff is 1073741824",
        ),
        (ok().with_shared_d_ff(usize::MAX / 8), "shared_d_ff is"),
        (ok().with_top_k(0), "top_k (0)"),
        (ok().with_top_k(5), "top_k (5)"),
        (ok().with_gate_noise(-1.0), "gate_noise is -1"),
        (ok().with_gate_noise(f64::NAN), "gate_noise is NaN"),
        (ok().with_init_std(f64::INFINITY), "init_std is inf"),
        (ok().with_router_init_std(-0.1), "router_init_std is -0.1"),
        (ok().with_expert_dropout(1.0), "expert_dropout is 1"),
        (
            ok().with_expert_dropout(1.0 - 1e-12),
            "expert_dropout is 0.99",
        ),
        (ok().with_expert_dropout(-0.1), "expert_dropout is -0.1"),
        (
            ok().with_balance(BalanceConfig::gshard(-1.0)),
            "balance.gshard is -1",
        ),
        (
            ok().with_balance(BalanceConfig::NONE.with_z_loss(f64::NAN)),
            "balance.z_loss is NaN",
        ),
        (
            ok().with_gate_noise(0.0)
                .with_balance(BalanceConfig::load_importance(0.1)),
            "gate_noise is 0",
        ),
        (ok().with_router(cosine(0, 0.5)), "router.dim is 0"),
        (
            ok().with_router(cosine(3, 0.0)),
            "router.init_temperature is 0",
        ),
        (
            ok().with_router(cosine(3, f64::NAN)),
            "router.init_temperature is NaN",
        ),
    ];
    for (config, part) in cases {
        let message = config
            .init::<Cpu>(&Default::default())
            .unwrap_err()
            .to_string();
        assert!(message.contains(part), "{part:?} is not in {message:?}");
        assert!(message.contains(';'), "no remedy in {message:?}");
    }
    ok().validate().unwrap();
}
