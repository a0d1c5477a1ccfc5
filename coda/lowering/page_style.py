"""The style of the page: colours for light and dark, type, boxes and lanes."""

STYLE = """
:root{--ink:#1c2024;--soft:#5b6570;--line:#d9dee3;--paper:#fbfbfa;--card:#fff;--lane:#6b7f93;
--given:#b3a27a;--gemm:#2b6cb0;--rowwise:#b7791f;--torch:#a03a3a;--own:#2b6cb0;--other:#b9c3cd;
--mainloop:#2b6cb0;--feed:#7fb0de;--epilogue:#8a6bbf;--memory:#d29a35;--launch:#8d99a5;
--cublas:#c9d0d7;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e7eaed;--soft:#9aa5b1;--line:#343b43;
--paper:#14171a;--card:#1c2126;--lane:#8ea3b8;--given:#a08f63;--gemm:#6aa9e9;--rowwise:#e0a850;
--torch:#e07b7b;--own:#6aa9e9;--other:#4a545f;--mainloop:#6aa9e9;--feed:#3f6d9b;
--epilogue:#a98be0;--memory:#e0a850;--launch:#78848f;--cublas:#4a545f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:30px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 6px}
h3{font-size:16px;margin:28px 0 4px;overflow-wrap:anywhere}
h4{font-size:15px;margin:0}
h5{font-size:12px;font-weight:600;color:var(--soft);margin:0 0 2px}
p{margin:4px 0 8px}
code{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.about,.note,.fine,.legend{color:var(--soft)}
.about{margin-top:6px;overflow-wrap:anywhere}
.note{max-width:72ch}
.bars{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:20px;margin-top:12px}
figure{margin:0;padding:14px 16px 10px;background:var(--card);border:1px solid var(--line);
border-radius:8px}
figcaption{font-weight:600;margin-bottom:6px}
.bars ul{list-style:none;margin:0;padding:0}
.bars li{display:grid;grid-template-columns:minmax(0,1fr) auto;column-gap:12px;font-size:13px;
margin-bottom:8px}
.bars .name{color:var(--soft)}
.bars .value{text-align:right}
.bars .bar{grid-column:1/-1}
.bar{display:flex;height:6px;border-radius:3px;overflow:hidden;margin:2px 0}
.bar .own{background:var(--own)} .bar .other{background:var(--other)}
.flow{display:grid;grid-template-columns:repeat(var(--lanes),18px) minmax(0,1fr);margin-top:14px}
.cell{padding:7px 0 7px 22px;min-width:0}
.box{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--soft);
border-radius:8px;padding:12px 16px 10px;position:relative;min-height:74px}
.box.gemm{border-left-color:var(--gemm)} .box.rowwise{border-left-color:var(--rowwise)}
.box.torch{border-left-color:var(--torch)}
.box header{display:flex;flex-wrap:wrap;gap:2px 12px;align-items:baseline}
.box.ends{background:none;border-style:dashed;border-left-width:1px}
.what{color:var(--ink)}
.time{margin:4px 0 8px} .time p{margin:0;font-size:13px;color:var(--soft)}
.time b{color:var(--ink);font-size:14px}
.part.mainloop{background:var(--mainloop)} .part.feed{background:var(--feed)}
.part.epilogue{background:var(--epilogue)} .part.memory{background:var(--memory)}
.part.launch{background:var(--launch)} .part.cublas{background:var(--cublas)}
.legend{font-size:12px;display:flex;flex-wrap:wrap;gap:4px 6px;align-items:center}
.legend .part{width:12px;height:8px;border-radius:2px;margin-left:10px}
.why{font-size:13px;max-width:72ch}
.ops,.ports{list-style:none;margin:0;padding:0;font-size:13px}
.ops li{padding-left:0;overflow-wrap:anywhere} .ops code{color:var(--soft);margin-right:6px}
.io{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px;margin-top:10px}
.ports li{overflow-wrap:anywhere} .ports b{font-weight:600}
.ports i{font-style:normal;margin-left:4px} .ports span{color:var(--soft);margin-left:4px}
.ports.row{display:flex;flex-wrap:wrap;gap:2px 18px}
.fine{font-size:12px;margin:8px 0 0} .fine:empty{display:none}
.lane{pointer-events:auto;min-width:0;--c:var(--lane)}
.lane.past{border-left:var(--w) solid var(--c)}
.lane.out{align-self:end;height:var(--h);border-left:var(--w) solid var(--c);
border-top:var(--w) solid var(--c);border-top-left-radius:7px}
.lane.in{align-self:start;height:var(--h);border-bottom:var(--w) solid var(--c)}
.lane.in.last{border-left:var(--w) solid var(--c);border-bottom-left-radius:7px}
.lane.in,.lane.out{margin-right:-22px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px;margin:8px 0}
th{font-weight:600;text-align:left;color:var(--soft);border-bottom:1px solid var(--line)}
th,td{padding:5px 14px 5px 0;vertical-align:top;overflow-wrap:anywhere}
td{border-bottom:1px solid var(--line)}
.n{text-align:right;white-space:nowrap}
details{margin:6px 0} summary{cursor:pointer;color:var(--soft);font-size:13px}
.fold{border:1px solid var(--line);border-radius:8px;padding:4px 18px 14px;margin-top:16px;
background:var(--card)}
.fold>summary{font-size:15px;color:var(--ink);padding:8px 0;overflow-wrap:anywhere}
.fold .box,.fold figure{background:var(--paper)}
.fold h2{font-size:16px;margin-top:24px}
@media (max-width:720px){main{padding:24px 14px 60px}
.fold{padding:4px 12px 12px} .bars{grid-template-columns:minmax(0,1fr)}
.flow{grid-template-columns:repeat(var(--lanes),0) minmax(0,1fr)} .cell{padding-left:0}
.lane,.wide{display:none} .io{grid-template-columns:minmax(0,1fr);gap:8px} h1{font-size:24px}
.box{padding:12px 12px 10px} th,td{padding-right:8px}}
"""
