// Style sheet and script of the report's page.
#include "recipes/report_page.h"

namespace sala::recipes {

const char kReportStyle[] = R"css(
:root{color-scheme:light dark;--bg:#fff;--panel:#fff;--page:#f6f7f9;--ink:#1b1f24;--ink2:#5c6570;--rule:#e3e6ea;
--c0:#3b6fd4;--c1:#dd6b20;--c2:#2f9e44;--c3:#9c36b5;--c4:#0c8599;--c5:#d6336c;--c6:#b7860b;--c7:#6741d9;--c8:#7a8591;--c9:#8d5a3b;
--hot:#2563c9;--cold:#eef2f8;--good:#2f9e44;--bad:#d6336c;--warn:#dd6b20}
@media(prefers-color-scheme:dark){:root{--bg:#15181d;--panel:#1a1e24;--page:#111418;--ink:#e8eaed;--ink2:#9aa4af;--rule:#2b313a;
--c0:#6d9cf5;--c1:#f59f58;--c2:#5cc774;--c3:#cc85e0;--c4:#3fb8cc;--c5:#f279a2;--c6:#dcb04a;--c7:#9d82f5;--c8:#9aa4af;--c9:#c1906f;
--hot:#6d9cf5;--cold:#20262f}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:27px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 2px;letter-spacing:-.005em}
h3{font-size:14px;font-weight:600;margin:22px 0 6px}
p.lead{margin:0 0 14px;color:var(--ink2);font-size:13.5px;max-width:84ch}
section,header.top{background:var(--panel);border:1px solid var(--rule);border-radius:10px;padding:20px 22px;margin:0 0 18px}
.row{display:flex;flex-wrap:wrap;align-items:center;gap:12px}
.state{font-size:12.5px;font-weight:600;padding:2px 10px;border-radius:99px;border:1px solid currentColor}
.state.done{color:var(--good)}.state.failed{color:var(--bad)}.state.live{color:var(--c0)}.state.stopping{color:var(--warn)}
.bar{display:flex;height:8px;border-radius:99px;background:var(--rule);overflow:hidden;margin:18px 0 16px}
.bar i{display:block;height:100%}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:12px 18px}
.facts div b{display:block;font-size:19px;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.25;overflow-wrap:anywhere}
.facts div span{color:var(--ink2);font-size:12.5px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--ink2);text-align:right;border-bottom:1px solid var(--rule);padding:4px 10px;font-size:12.5px;white-space:nowrap}
td{text-align:right;padding:6px 10px;border-bottom:1px solid var(--rule);white-space:nowrap}
td.text,th.text{text-align:left}td.wrap{white-space:normal;min-width:200px}
tr:last-child td{border-bottom:0}
th:first-child,td:first-child{padding-left:0}
i.chip{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:8px}
.quiet .legend{display:none}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:6px 28px}
.plot{position:relative;margin:4px 0 14px}
.plot svg{display:block;width:100%;height:auto;overflow:visible}
svg.narrow{display:none!important}
svg text{font-size:11px;fill:var(--ink2);font-family:inherit}
svg text.label{font-size:11.5px}svg text.mid{text-anchor:middle}svg text.end{text-anchor:end}
svg text.tick{font-variant-numeric:tabular-nums}
svg text.cell{fill:var(--ink);font-size:11px;pointer-events:none}svg text.cell.hi{fill:var(--bg)}
line.grid{stroke:var(--rule);stroke-width:1}line.axis{stroke:var(--ink2);stroke-width:1;opacity:.6}
line.cursor{stroke:var(--ink2);stroke-width:1;stroke-dasharray:3 3}
path.line{fill:none;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
path.faint{stroke-width:1;opacity:.34}path.dashed{stroke-dasharray:5 4}
rect.band{opacity:.055}rect.none{fill:none;stroke:var(--rule)}rect.kept{fill:var(--c1)}rect.plain{fill:var(--c8);opacity:.6}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12.5px;color:var(--ink2);margin-top:4px}
.key{display:inline-block;width:16px;border-top:2.5px solid;vertical-align:middle;margin-right:6px}
.key.dashed{border-top-style:dashed}.key.dots{width:8px;height:8px;border:2px solid;border-radius:99px}
.key.square{width:10px;height:10px;border:5px solid;border-radius:3px}
.tip{position:absolute;pointer-events:none;background:var(--panel);border:1px solid var(--rule);border-radius:7px;padding:6px 10px;
font-size:12.5px;line-height:1.45;box-shadow:0 4px 14px rgba(0,0,0,.14);white-space:nowrap;z-index:2;font-variant-numeric:tabular-nums}
.tip i{display:inline-block;width:8px;height:8px;border-radius:99px;margin-right:6px}
details{margin:8px 0}summary{cursor:pointer;font-size:13.5px}
pre{margin:8px 0;padding:12px 14px;background:var(--page);border-radius:8px;overflow:auto;max-height:460px;font:12px/1.5 ui-monospace,"DejaVu Sans Mono",monospace}
dl{display:grid;grid-template-columns:max-content 1fr;gap:5px 20px;margin:0;font-size:13.5px}
dt{color:var(--ink2)}dd{margin:0;overflow-wrap:anywhere}
ul{margin:6px 0;padding-left:20px;font-size:13px}li{overflow-wrap:anywhere}
ul.log{list-style:none;padding:0;font:12px/1.55 ui-monospace,"DejaVu Sans Mono",monospace;max-height:340px;overflow:auto}
footer{color:var(--ink2);font-size:12.5px}
@media(max-width:640px){main{padding:14px 10px 40px}section,header.top{padding:15px 13px}h1{font-size:22px}
svg.wide{display:none!important}svg.narrow{display:block!important}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
)css";

// Values of all series at the place of the pointer.
const char kReportScript[] = R"js(
document.querySelectorAll('.plot[data-plot]').forEach(function(box){
  var plot=JSON.parse(box.dataset.plot),tip=document.createElement('div');
  tip.className='tip';tip.hidden=true;box.appendChild(tip);
  function number(v){var a=Math.abs(v);return a!==0&&(a<1e-3||a>=1e7)?v.toExponential(3):
    v.toLocaleString('en',{maximumSignificantDigits:a>=1e4?7:5})}
  box.querySelectorAll('svg').forEach(function(svg){
    var cursor=svg.querySelector('.cursor'),place=svg.dataset.box.split(' ').map(Number),
      range=svg.dataset.range.split(' ').map(Number),log=svg.dataset.log==='1';
    function position(x){return place[0]+((log?Math.log(x):x)-range[0])/(range[1]-range[0])*(place[1]-place[0])}
    svg.addEventListener('pointermove',function(event){
      var bounds=svg.getBoundingClientRect(),scale=svg.viewBox.baseVal.width/bounds.width,
        at=(event.clientX-bounds.left)*scale,best=null;
      plot.series.forEach(function(s){s.p.forEach(function(p){
        var d=Math.abs(position(p[0])-at);if(best===null||d<best.d)best={d:d,x:p[0]}})});
      if(best===null||best.d>40){leave();return}
      var px=position(best.x);cursor.setAttribute('x1',px);cursor.setAttribute('x2',px);cursor.setAttribute('visibility','visible');
      tip.textContent='';var head=document.createElement('div');head.textContent=plot.x+' '+number(best.x);tip.appendChild(head);
      plot.series.forEach(function(s){var near=null;s.p.forEach(function(p){
          if(p[0]===best.x)near=p});
        if(near===null||!s.n)return;var line=document.createElement('div'),dot=document.createElement('i');
        dot.style.background=s.c;line.appendChild(dot);line.appendChild(document.createTextNode(s.n+': '+number(near[1])));
        tip.appendChild(line)});
      tip.hidden=false;var left=px/scale+12;
      if(left+tip.offsetWidth>bounds.width)left=px/scale-tip.offsetWidth-12;
      tip.style.left=Math.max(0,left)+'px';tip.style.top='34px'});
    function leave(){tip.hidden=true;cursor.setAttribute('visibility','hidden')}
    svg.addEventListener('pointerleave',leave)})});
)js";

}  // namespace sala::recipes
